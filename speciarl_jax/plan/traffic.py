"""What a decode step on a GPU moves: weights, caches, logits, copies of them, and the rest.

After fusion each instruction of a loop's body is a kernel: it reads its operands from memory and
writes its result there. What a value is follows from where it comes from: an argument of
`rollout.decode.decode_chunk` by its name, through the loops that carry it. A kernel that only moves
(slices, concatenates, converts) weights or caches makes a copy; what it writes and what is then
read of it is what a step could do without.

    weights [36, D, F] --slice, concatenate--> [D, 2F] --matmul--> [R, 2F]
        read: weights        written: copies       read: copies     written: rest

Bytes are counted by `plan.hlo`. Kernels inside a library call (cuBLAS, cuDNN) are one launch; a
processor's caches are not modelled.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TypeAlias

from speciarl_jax.plan import hlo
from speciarl_jax.plan.hlo import Computation, Instruction, Module

KINDS = ("weights", "caches", "logits", "copies", "rest")
Kinds: TypeAlias = str | tuple[str, ...]  # of an array, or of each part of a tuple

_MOVES = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "copy", "transpose"),
    *("reshape", "broadcast", "slice", "dynamic-slice", "concatenate", "convert", "pad", "iota"),
}


@dataclasses.dataclass(frozen=True)
class StepTraffic:
    """What one step of the decode loop does to one device.

    Attributes:
        moved: bytes read and written, by `KINDS`.
        needed: bytes of weights and caches that the program was given, and of logits written once
            and read once.
        launches: kernels; those of a loop count as often as it runs.
    """

    moved: dict[str, int]
    needed: dict[str, int]
    launches: int


def entry_bytes(module: Module) -> int:
    """Bytes of the arguments that a program takes on one device; unused ones are not among them."""
    return sum(map(_size, module.computations[module.entry].parameters))


def _size(one: Instruction) -> int:
    return sum(shape.num_bytes for shape in one.shapes)


def decode_traffic(module: Module, vocab_sizes: tuple[int, int]) -> StepTraffic:
    """Traffic of one step of a compiled `rollout.decode.decode_chunk`.

    Args:
        module: optimised HLO for GPU.
        vocab_sizes: columns of the logits, in all and on one device.

    Raises:
        ValueError: the program has not just one loop whose length XLA does not know.
    """
    entry = module.computations[module.entry]
    loops = [
        one
        for one in entry.instructions.values()
        if one.opcode == "while" and hlo.trip_count(module, one) is None
    ]
    if len(loops) != 1:
        raise ValueError(f"a decode program has one loop of unknown length; found {len(loops)}")
    reader = _Reader(module, vocab_sizes, dict.fromkeys(KINDS, 0))
    carried = reader.kinds_of(entry, ())[loops[0].operands[0]]
    body = module.computations[loops[0].calls("body")]
    launches = reader.count(body, carried, 1)
    (rows,) = (one.shapes[0].dims[0] for one in entry.parameters if "state.hidden" in one.text)
    needed = _needed(entry.parameters) | {"logits": 2 * 4 * rows * vocab_sizes[1]}
    return StepTraffic(reader.moved, needed, launches)


def _needed(parameters: list[Instruction]) -> dict[str, int]:
    """Arguments that every step reads once: not an embedding beside a head, but all others."""
    found = {"weights": 0, "caches": 0}
    has_head = any("lm_head" in one.text for one in parameters)
    for one in parameters:
        is_rows = has_head and "embedding" in one.text
        if not is_rows and (kind := _argument_kind(one)) in found:
            found[kind] += _size(one)
    return found


def _argument_kind(parameter: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', parameter.text)
    start = name[1] if name else ""
    if start.startswith("states["):
        return "weights"
    return "caches" if start.startswith(("prompts.kv", "state.own")) else "rest"


def _source(sources: list[Kinds]) -> str:
    """What a kernel that only moves would make a copy of; "" if nothing that lasts."""
    return next((kind for kind in ("weights", "caches", "copies") if kind in sources), "")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Follows values through a program and adds up what becomes of them in `moved`."""

    module: Module
    vocab_sizes: tuple[int, int]
    moved: dict[str, int]

    def kinds_of(self, computation: Computation, arguments: tuple[Kinds, ...]) -> dict[str, Kinds]:
        """What each value of a computation is, given what its parameters are; () for the entry."""
        found: dict[str, Kinds] = {}
        for number, one in enumerate(computation.parameters):
            found[one.name] = arguments[number] if arguments else _argument_kind(one)
        for one in computation.instructions.values():
            if one.opcode != "parameter":
                sources = [found[name] for name in one.operands]
                found[one.name] = self._kind(one, sources, is_entry=not arguments)
        return found

    def _kind(self, one: Instruction, sources: list[Kinds], *, is_entry: bool) -> Kinds:
        if one.opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", one.text)
            whole = sources[0]
            return whole[int(index[1])] if index and isinstance(whole, tuple) else whole
        if one.opcode == "tuple":
            return tuple(kind if isinstance(kind, str) else "rest" for kind in sources)
        if one.opcode in ("bitcast", "while", "opt-barrier"):
            return sources[0]
        if (source := _source(sources)) and self._is_move(one):
            # Before the loop a copy is made once, not in every step.
            return source if is_entry else "copies"
        if "caches" in sources and self._is_update(one):
            return "caches"
        return "logits" if self.is_logits(one) else "rest"

    def is_logits(self, one: Instruction) -> bool:
        """Whether a value has the columns of the vocabulary, and rows."""
        return any(len(x.dims) > 1 and x.dims[-1] in self.vocab_sizes for x in one.shapes)

    def _inside(self, one: Instruction) -> list[Instruction]:
        if one.opcode != "fusion":
            return [one]
        return list(self.module.computations[one.calls("calls")].instructions.values())

    def _is_move(self, one: Instruction) -> bool:
        """Whether a kernel computes nothing but indices."""
        return all(
            inner.opcode in _MOVES or not any(shape.dims for shape in inner.shapes)
            for inner in self._inside(one)
        )

    def _is_update(self, one: Instruction) -> bool:
        return any(inner.opcode == "dynamic-update-slice" for inner in self._inside(one))

    def count(self, body: Computation, carried: Kinds, times: int) -> int:
        """Adds what a loop's body does, `times` over; returns its launches."""
        kinds, launches = self.kinds_of(body, (carried,)), 0
        for one in body.instructions.values():
            if one.opcode == "while":
                inner = self.module.computations[one.calls("body")]
                trips = hlo.trip_count(self.module, one) or 1
                launches += self.count(inner, kinds[one.operands[0]], times * trips)
            elif hlo.is_kernel(one):
                launches += times
                self._count_kernel(one, body, kinds, times)
        return launches

    def _count_kernel(
        self, one: Instruction, body: Computation, kinds: dict[str, Kinds], times: int
    ) -> None:
        reads, written = hlo.parts(self.module, body, one)
        names = [*one.operands, one.name]
        for name, num_bytes in zip(names, [*reads, written], strict=True):
            kind = kinds[name]
            self.moved[kind if isinstance(kind, str) else "rest"] += times * num_bytes
