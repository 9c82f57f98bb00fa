"""CPU with eight fake devices, implicit rank promotion an error, no network beyond loopback.

Every annotation of the package is checked at run time, shapes included: jaxtyping's import hook
puts beartype around each function, so nothing of the package may be imported before it is there.
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

import socket

import jax
import pytest
from jaxtyping import install_import_hook

# An int may stand where a float is annotated, as PEP 484 and mypy have it; beartype alone refuses.
install_import_hook(
    "speciarl_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
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
