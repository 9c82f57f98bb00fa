"""One run, one process group: whoever trains in a run directory holds it.

In a folder that is a lock of the system's, which ends with the process, however that ends. Object
stores have none: there the holder renews a small object, the lease, and whoever finds one watches
for a while whether it is renewed. No clocks of two machines are compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from fsspec.implementations.local import LocalFileSystem

from speciarl_jax.errors import TrainingStopped
from speciarl_jax.run.store import Store

LOCK_NAME = "run.lock"
BEAT_S = 10.0  # between two renewals of a lease
_READS = 5  # of a lease that is just being written
_MISSED = 3.5  # beats without a renewal after which a lease is nobody's


class Lease:
    """An object that says who trains, renewed until it is given back.

    Attributes:
        is_lost: somebody else has taken it; nothing may be written any more.
    """

    def __init__(self, store: Store, path: str, address: str, beat_s: float | None = None) -> None:
        """Takes the lease and starts to renew it.

        Args:
            store: where the run is kept.
            path: the lease's own there.
            address: of the run, for messages.
            beat_s: seconds between renewals, the same for all who use this lease; None: `BEAT_S`.

        Raises:
            ValueError: somebody holds it.
            OSError: the store refuses.
        """
        self._beat_s = beat_s = BEAT_S if beat_s is None else beat_s
        self._store, self._path, self._address = store, path, address
        self._owner, self._beats, self.is_lost = uuid.uuid4().hex, 0, False
        found = self._read()
        if found:
            print(f"{address}: {_holder(found)} was here; is it still?", file=sys.stderr)
            self._watch(found, beat_s * _MISSED)
        self._write()
        time.sleep(min(beat_s, 2.0))  # another may have looked before it was written
        self._refuse_other(self._read())
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _watch(self, found: dict[str, object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._beat_s / 4)
            now = self._read()
            if not now:
                return
            if now != found:
                self._refuse_other(now)

    def _refuse_other(self, found: dict[str, object]) -> None:
        if found and found.get("owner") != self._owner:
            raise ValueError(_in_use(self._address, found))

    def _renew(self) -> None:
        while not self._is_over.wait(self._beat_s):
            with contextlib.suppress(OSError):  # the next beat may come through
                found = self._read()
                if found and found.get("owner") != self._owner:
                    self.is_lost = True
                    return
                self._write()

    def _read(self) -> dict[str, object]:
        for _ in range(_READS):
            try:
                content = json.loads(self._store.read(self._path))
            except FileNotFoundError:
                return {}
            except ValueError:  # its owner is at it: not every store writes a file at once
                time.sleep(0.05)
                continue
            return content if isinstance(content, dict) else {"owner": "unknown"}
        return {"owner": "unknown"}  # half written, or by nobody who counts

    def _write(self) -> None:
        self._beats += 1
        who = _who() | {"owner": self._owner, "beats": self._beats}
        self._store.write(self._path, json.dumps(who).encode())

    def check(self) -> None:
        """Call before something is written that the next holder reads.

        Raises:
            TrainingStopped: somebody else has taken the lease.
        """
        if self.is_lost:
            raise TrainingStopped(
                f"--workdir={self._address}: another process has taken this run over, as nothing "
                f"was heard from here for {self._beat_s * _MISSED:.0f} s; it goes on there"
            )

    def close(self) -> None:
        """Gives the lease back, if it is still this one's."""
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it runs out by itself
            if self._read().get("owner") == self._owner:
                self._store.delete(self._path)


@contextlib.contextmanager
def hold_folder(folder: pathlib.Path) -> Iterator[Lease | None]:
    """Holds a folder for this process, and makes it if needed; left again if it stayed empty.

    Yields:
        None where the system locks files, else a lease.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be made or written to.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(_remove_if_empty, folder)
        lease = None
        try:
            descriptor = _locked(path, folder)
            stack.callback(os.close, descriptor)
            stack.callback(path.unlink, missing_ok=True)  # while it is locked: see `_locked`
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            lease = Lease(Store(LocalFileSystem()), str(path), str(folder))
            stack.callback(lease.close)
        yield lease


def _locked(path: pathlib.Path, folder: pathlib.Path) -> int:
    """Descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have deleted it since it was opened: then it locks nothing.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_who()).encode())
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            text = os.read(descriptor, 4096)
            os.close(descriptor)
            raise ValueError(_in_use(str(folder), _parsed(text))) from None
        except OSError:
            os.close(descriptor)
            raise


def _parsed(text: bytes) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}


def _who() -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(found: dict[str, object]) -> str:
    if "pid" not in found:
        return "a process"
    return f"process {found['pid']} on {found.get('host')} (since {found.get('since')})"


def _in_use(address: str, found: dict[str, object]) -> str:
    return (
        f"--workdir={address}: {_holder(found)} trains there; wait for it or stop it (SIGTERM "
        "saves), or use another directory"
    )


def _remove_if_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
