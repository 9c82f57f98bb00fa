"""The local judge as a process: the server's main loop, and the parent's handle on it.

The child tells its port on standard output and stops when its standard input ends or its parent
is gone, so it never outlives a run, not even one ended by `kill -9`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.offline.faults import FaultPlan
from speciarl_jax.judge.offline.taxonomy import TaxonomyJudge

_LOG = logging.getLogger(__name__)
__all__ = ["LocalJudgeServer", "main", "serve"]


async def _run(args: argparse.Namespace) -> None:
    """Serves until a signal arrives or, if asked, until the parent is gone."""
    judge = TaxonomyJudge.from_path(args.taxonomy)
    faults = FaultPlan.parse(args.faults) if args.faults else None
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serve(judge, args.port, faults, args.host) as url:
        told = f"{args.taxonomy}: {judge.describe()}"
        print(json.dumps({"url": url, "taxonomy": told}), flush=True)
        if not args.watch_parent:
            print(f"judging by {told}; stop with Ctrl-C", flush=True)
            await stop.wait()
            return
        parent = os.getppid()
        loop.add_reader(0, lambda: None if os.read(0, 4096) else stop.set())
        while not stop.is_set() and os.getppid() == parent:
            try:
                await asyncio.wait_for(stop.wait(), timeout=1.0)
            except TimeoutError:
                continue


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m speciarl_jax.judge.offline.server`; also `speciarl judge serve`.

    Returns:
        0 after a stop that was asked for, 1 after an error, which is one line of JSON on
        standard output.
    """
    parser = argparse.ArgumentParser(prog="speciarl judge serve")
    parser.add_argument("--taxonomy", required=True, help="tree: .json, .csv or a WordNet folder")
    parser.add_argument("--port", type=int, default=0, help="TCP port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--faults", default="", help="faults on purpose, such as 429=0.1,hang=0.01")
    parser.add_argument("--watch-parent", action="store_true", help="stop when stdin ends")
    args = parser.parse_args(argv)
    try:
        asyncio.run(_run(args))
    except (JudgeError, ValueError, OSError) as error:
        print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
        return 1
    return 0


class LocalJudgeServer:
    """The offline judge in a child process on a loopback port; a context manager.

    Example:
        with LocalJudgeServer("taxonomy.json") as server:
            ...  # server.url ends in /v1
    """

    def __init__(self, taxonomy: str | Path, port: int = 0, faults: str = "") -> None:
        """Describes the server; `port` 0 takes a free one, `faults` is for `FaultPlan.parse`."""
        self._taxonomy = Path(taxonomy)
        self._port = port
        self._faults = faults
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.told = ""  # what the tree can tell, once it runs

    @property
    def pid(self) -> int:
        """Process id of the child, 0 if none runs."""
        return self._process.pid if self._process else 0

    def start(self, deadline_s: float = 30.0) -> str:
        """Starts the child, waits until it listens and returns its base URL.

        Raises:
            JudgeError: it did not come up within `deadline_s` seconds; the message says why.
        """
        command = [sys.executable, "-m", "speciarl_jax.judge.offline.server", "--watch-parent"]
        command += ["--taxonomy", str(self._taxonomy), "--port", str(self._port)]
        command += ["--faults", self._faults] if self._faults else []
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            self.url = self._read_url(deadline_s)
        except JudgeError:
            self.stop()
            raise
        return self.url

    def _read_url(self, deadline_s: float) -> str:
        """The base URL from the child's first line, said when it listens."""
        assert self._process is not None
        assert self._process.stdout is not None
        lines: queue.Queue[bytes] = queue.Queue()
        stdout = self._process.stdout
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=deadline_s)
        except queue.Empty:
            raise JudgeError(f"local judge: no sign of life within {deadline_s:g} s") from None
        try:
            value = json.loads(line)
        except ValueError:
            raise JudgeError(f"local judge: ended at once, saying {line[:200]!r}") from None
        if "url" not in value:
            raise JudgeError(f"local judge did not start: {value.get('error')}")
        self.told = str(value.get("taxonomy", ""))
        # A ladder without rungs changes what a reward means: nobody should find out from a curve.
        _LOG.log(
            logging.WARNING if ": no " in self.told else logging.INFO, "judge by %s", self.told
        )
        return str(value["url"])

    def stop(self) -> None:
        """Stops the child; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> LocalJudgeServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


if __name__ == "__main__":
    sys.exit(main())
