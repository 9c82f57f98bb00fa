"""Compiles a program for devices that are not there and reads what XLA says of it."""

from __future__ import annotations

import collections
import dataclasses
import re
import time

import jax

from speciarl_jax.plan import hlo
from speciarl_jax.plan.programs import Program, device_bytes
from speciarl_jax.plan.traffic import StepTraffic, decode_traffic, entry_bytes

_TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_TOO_MANY_TEMPORARIES = re.compile(
    r"for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the HLO of one program says that it moves on one device, see `plan.hlo`.

    A loop whose trip count XLA does not know counts once: in the decode program one step.

    Attributes:
        collectives: transfers in the text by kind; one in a loop counts once.
        in_loop: the largest array that is gathered or summed inside a loop, bytes, and its kind.
        around: bytes of arrays that are written a second time before and after the loops.
        loop_bytes: read and written in the main memory inside the loops.
        loop_wire: that the device sends inside the loops.
        loop_hops: of those transfers, one after the other.
        launches: kernels in the loops.
    """

    collectives: dict[str, int]
    in_loop: tuple[int, str] = (0, "")
    around: int = 0
    loop_bytes: int = 0
    loop_wire: float = 0
    loop_hops: int = 0
    launches: int = 0

    @classmethod
    def of(cls, text: str) -> Traffic:
        """Reads an HLO text."""
        module = hlo.parse(text)
        calls = hlo.collectives(module)
        inside = [one for one in calls if one.depth]
        return cls(
            collectives=dict(collections.Counter(one.kind for one in calls)),
            in_loop=max(((one.num_bytes, one.kind) for one in inside), default=(0, "")),
            around=sum(size for run, size in hlo.copies(module) if not run.depth),
            loop_bytes=hlo.loop_traffic(module),
            loop_wire=sum(one.times * one.wire_bytes for one in inside),
            loop_hops=sum(one.times * one.hops for one in inside),
            launches=hlo.launches(module),
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled program; bytes on one device.

    Attributes:
        name: of the program.
        arguments: bytes of the arguments that it uses.
        temporaries: bytes of everything between, results that reuse no argument included.
        others: bytes of what else is alive meanwhile, arguments that it does not use included.
        traffic: what its HLO moves.
        compile_s: wall seconds to trace and compile.
        is_too_large: XLA refused it; `temporaries` is then what it says it needs in all.
        step: what one step of the decode loop moves, read from the program for GPU; else None.
    """

    name: str
    arguments: int
    temporaries: int
    others: int
    traffic: Traffic
    compile_s: float
    is_too_large: bool = False
    step: StepTraffic | None = None

    @property
    def peak(self) -> int:
        """Bytes that the device needs while it runs."""
        return self.arguments + self.temporaries + self.others

    def fits(self, usable_bytes: int) -> bool:
        """Whether a device of so many usable bytes can run it."""
        return not self.is_too_large and self.peak <= usable_bytes


def measure(program: Program, vocab_sizes: tuple[int, int] | None = None) -> Measured:
    """Compiles one program.

    Args:
        program: to compile.
        vocab_sizes: for `traffic.decode_traffic`; None to leave it out.

    Raises:
        ValueError: XLA fails for another reason than memory; the message is its own. Or jaxlib
            cannot read what another libtpu than its own compiled.
    """
    start = time.perf_counter()
    lowered, others = program.lower(), device_bytes(program.others)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        arguments = device_bytes((program.args, program.kwargs))
        more = max(_needed_bytes(str(error), arguments) - arguments, 0)
        seconds = time.perf_counter() - start
        refused = (program.name, arguments, more, others, Traffic({}), seconds)
        return Measured(*refused, is_too_large=True)
    memory = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"jaxlib cannot read what libtpu compiled ({reason})") from error
    if memory is None or text is None:
        raise ValueError(
            f"{program.name}: this XLA tells neither memory nor operations of a compiled program; "
            "plan with another version of jax"
        )
    module = hlo.parse(text)
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Measured(
        program.name,
        memory.argument_size_in_bytes,
        temporaries - memory.alias_size_in_bytes,
        # jit drops arguments that are not used; they stay on the device nevertheless.
        others + max(device_bytes((program.args, program.kwargs)) - entry_bytes(module), 0),
        Traffic.of(text),
        time.perf_counter() - start,
        step=decode_traffic(module, vocab_sizes) if vocab_sizes else None,
    )


def _needed_bytes(message: str, arguments: int) -> int:
    """What XLA for TPU says that a program needs, in the words of one of two of its passes.

    Raises:
        ValueError: the message is about something else.
    """
    for pattern, more in ((_TOO_MUCH, 0), (_TOO_MANY_TEMPORARIES, arguments)):
        if found := pattern.search(message):
            return int(float(found[1]) * _UNITS[found[2]]) + more
    raise ValueError(f"XLA refuses a program: {' '.join(message.split())[:500]}")
