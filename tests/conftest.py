"""CPU with eight fake devices, implicit rank promotion an error, no network beyond loopback.

Every annotation of the package is checked at run time, shapes included: import hooks put beartype
around each function, so nothing of the package may be imported before they are there.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compile fast rather than run fast: most of the suite's time is XLA's.
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_optimization_level=0",
        # Eight fake devices on two cores may meet late at a collective.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    ]
)
# Programs that any process of the tests has compiled are read by the others, and the next time.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", os.path.abspath(f"{__file__}/../../.compile_cache/tests")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import socket
from pathlib import Path

import jax
import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

# An int may stand where a float is annotated, as PEP 484 and mypy have it; beartype alone refuses.
beartype_package("speciarl_jax", conf=BeartypeConf(is_pep484_tower=True, claw_is_pep526=False))
# A dimension's name means one size within a call: jaxtyping holds that, in the files that name
# dimensions only, for its frame around a call costs more than the small functions of the others.
SOURCES = Path(__file__).parent.parent / "speciarl_jax"
install_import_hook(
    [
        ".".join(file.relative_to(SOURCES.parent).with_suffix("").parts)
        for file in SOURCES.rglob("*.py")
        if "jaxtyping" in file.read_text()
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

jax.config.update("jax_numpy_rank_promotion", "raise")

_connect = socket.socket.connect


def _connect_to_loopback(self, address):
    host = address[0] if isinstance(address, tuple) else ""
    if host and host not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"tests must not reach the network: {address}")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _connect_to_loopback)
