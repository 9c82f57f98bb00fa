"""Bytes that one decode step moves in a GPU's memory, and its kernels, read from compiled HLO.

After fusion each instruction of a loop's body is a kernel: it reads its operands from memory and
writes its result there. What a value is follows from where it comes from: an argument of
`rollout.decode.decode_chunk` by its name, through the loops that carry it. A kernel that only moves
(slices, concatenates, converts) weights or caches makes a copy; what it writes and what is then
read of it is what a step could do without.

    weights [36, D, F] --slice, concatenate--> [D, 2F] --matmul--> [R, 2F]
        read: weights        written: copies       read: copies     written: rest

A fused slice reads what it slices, not its operand, and an update in place writes its column.
Kernels inside a library call (cuBLAS, cuDNN) count as one; caches of a processor are not modelled.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import TypeAlias

KINDS = ("weights", "caches", "logits", "copies", "rest")

_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}  # others end in their number
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_LINE = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
# Instructions that are no kernel.
_FREE = {"parameter", "get-tuple-element", "bitcast", "constant", "tuple", "after-all"}
_MOVES = _FREE | {
    *("copy", "transpose", "reshape", "broadcast", "slice", "dynamic-slice", "concatenate"),
    *("convert", "pad", "iota"),
}
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: ``%name = shape opcode(operands), rest``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str:
        """The computation named by ``calls``, ``body`` or ``to_apply``; "" if none is."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass
class StepTraffic:
    """What one step of the decode loop does to one device.

    Attributes:
        moved: bytes read and written, by `KINDS`.
        needed: bytes of weights and caches that the program was given, and of logits written once
            and read once.
        launches: kernels; those of a loop count as often as it runs.
    """

    moved: dict[str, float]
    needed: dict[str, float]
    launches: int

    def add(self, kind: str, num_bytes: float) -> None:
        """Counts bytes."""
        self.moved[kind] += num_bytes


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """(instructions of each computation in order, the entry's name)."""
    found: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif parsed := _LINE.match(line):
            root, name, shape, opcode, rest = parsed.groups()
            inside = rest[: _closing(rest)]
            operands = tuple(_OPERAND.findall(inside))
            current[name] = Instruction(name, shape, opcode, operands, rest, bool(root))
    return found, entry


def _closing(rest: str) -> int:
    """Where the operands end: the parenthesis that was opened before `rest`."""
    depth = 1
    for place, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if not depth:
            return place
    return len(rest)


def num_bytes(shape: str) -> float:
    """Of an array or a tuple as HLO writes it, ``bf16[36,2048]{1,0}``."""
    return sum(math.prod(dims) * _bits(kind) / 8 for kind, dims in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    for kind, dims in _ARRAY.findall(shape):
        yield kind, [int(dim) for dim in dims.split(",") if dim]


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(kind[1:])


def entry_bytes(text: str) -> float:
    """Bytes of the arguments that a program takes on one device; unused ones are not among them."""
    computations, entry = parse_hlo(text)
    found = computations[entry].values()
    return sum(num_bytes(one.shape) for one in found if one.opcode == "parameter")


def decode_traffic(text: str, vocab_sizes: tuple[int, ...]) -> StepTraffic:
    """Traffic of one step of a compiled `rollout.decode.decode_chunk`.

    Args:
        text: optimised HLO for GPU.
        vocab_sizes: columns that logits may have: V, and V over the tensor axis.

    Raises:
        ValueError: the program has no loop whose length is not known.
    """
    computations, entry = parse_hlo(text)
    reader = _Reader(computations, vocab_sizes)
    kinds = reader.kinds_of(entry, ())
    loops = [
        one
        for one in computations[entry].values()
        if one.opcode == "while" and "known_trip_count" not in one.rest
    ]
    if len(loops) != 1:
        raise ValueError(f"a decode program has one loop of unknown length; found {len(loops)}")
    traffic = StepTraffic(dict.fromkeys(KINDS, 0.0), _needed(computations[entry]), 0)
    carried = kinds[loops[0].operands[0]]
    reader.count(loops[0].called("body"), carried, 1, traffic)
    rows = re.search(rf"f32\[(\d+),(?:{'|'.join(map(str, vocab_sizes))})\]", text)
    columns = vocab_sizes[-1]
    traffic.needed["logits"] = 2 * 4 * int(rows[1]) * columns if rows else 0.0
    return traffic


def _needed(entry: Computation) -> dict[str, float]:
    """Arguments that every step reads once: not an embedding beside a head, but all others."""
    found = {"weights": 0.0, "caches": 0.0}
    parameters = [one for one in entry.values() if one.opcode == "parameter"]
    has_head = any("lm_head" in one.rest for one in parameters)
    for one in parameters:
        is_rows = has_head and "'embedding\\'" in one.rest
        if not is_rows and (kind := _argument_kind(one)) in found:
            found[kind] += num_bytes(one.shape)
    return found


def _argument_kind(parameter: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', parameter.rest)
    start = name[1] if name else ""
    if start.startswith("states["):
        return "weights"
    return "caches" if start.startswith(("prompts.kv", "state.own")) else "rest"


Kinds: TypeAlias = str | tuple[str, ...]  # of an array, or of each part of a tuple


def _moved(sources: list[Kinds]) -> str:
    """What a kernel that only moves would make a copy of; "" if nothing that lasts."""
    return next((kind for kind in ("weights", "caches", "copies") if kind in sources), "")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Follows values through a program."""

    computations: dict[str, Computation]
    vocab_sizes: tuple[int, ...]

    def kinds_of(self, computation: str, arguments: tuple[Kinds, ...]) -> dict[str, Kinds]:
        """What each value of a computation is, given what its parameters are."""
        found: dict[str, Kinds] = {}
        for one in self.computations[computation].values():
            found[one.name] = self._kind(one, found, arguments)
        return found

    def _kind(
        self, one: Instruction, found: dict[str, Kinds], arguments: tuple[Kinds, ...]
    ) -> Kinds:
        sources = [found[name] for name in one.operands]
        if one.opcode == "parameter":
            place = int(one.rest.split(")")[0])
            return arguments[place] if arguments else _argument_kind(one)
        if one.opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", one.rest)
            assert index is not None
            whole = sources[0]
            return whole[int(index[1])] if isinstance(whole, tuple) else whole
        if one.opcode == "tuple":
            return tuple(kind if isinstance(kind, str) else "rest" for kind in sources)
        if one.opcode in ("bitcast", "while", "optimization-barrier"):
            return sources[0]
        moved = _moved(sources)
        if moved and self.is_move(one):
            # Before the loop a copy is made once, not in every step.
            return "copies" if arguments else moved
        return self._result(one, sources)

    def _result(self, one: Instruction, sources: list[Kinds]) -> str:
        """What a kernel writes."""
        if "caches" in sources and self._updates(one):
            return "caches"
        is_logits = any(
            dims and dims[-1] in self.vocab_sizes and len(dims) > 1
            for _, dims in _arrays(one.shape)
        )
        return "logits" if is_logits else "rest"

    def is_move(self, one: Instruction) -> bool:
        """Whether a kernel computes nothing but indices."""
        fused = self.computations.get(one.called("calls"))
        if fused is None:
            return one.opcode in _MOVES
        return all(
            inner.opcode in _MOVES or re.match(r"\w+\[\]", inner.shape) for inner in fused.values()
        )

    def _updates(self, one: Instruction) -> list[Instruction]:
        """Updates in place that a kernel consists of."""
        fused = self.computations.get(one.called("calls"), {one.name: one})
        return [inner for inner in fused.values() if inner.opcode == "dynamic-update-slice"]

    def count(self, body: str, carried: Kinds, times: int, traffic: StepTraffic) -> None:
        """Adds what a loop's body does, `times` over."""
        kinds = self.kinds_of(body, (carried,))
        instructions = self.computations[body]
        for one in instructions.values():
            if one.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest)
                inner = times * (int(trips[1]) if trips else 1)
                self.count(one.called("body"), kinds[one.operands[0]], inner, traffic)
            elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
                traffic.launches += times
                self._count_kernel(one, instructions, kinds, times, traffic)

    def _count_kernel(
        self,
        one: Instruction,
        instructions: Computation,
        kinds: dict[str, Kinds],
        times: int,
        traffic: StepTraffic,
    ) -> None:
        fused = one.called("calls")
        for place, name in enumerate(one.operands):
            whole = num_bytes(instructions[name].shape)
            read = self.bytes_read(fused, place, whole) if fused else self._read(one, place, whole)
            kind = kinds[name]
            traffic.add(kind if isinstance(kind, str) else "rest", times * read)
        result = kinds[one.name]
        written = num_bytes(one.shape)
        for update in self._updates(one):
            written -= num_bytes(update.shape)
            written += num_bytes(self._shape_of(update.operands[1], fused, instructions))
        traffic.add(result if isinstance(result, str) else "rest", times * max(written, 0.0))

    def _shape_of(self, name: str, fused: str, instructions: Computation) -> str:
        return (self.computations[fused] if fused else instructions)[name].shape

    def _read(self, one: Instruction, place: int, whole: float) -> float:
        """Bytes that an instruction reads of one operand."""
        if one.opcode in _SLICES and place == 0:
            return num_bytes(one.shape)
        return 0.0 if one.opcode == "dynamic-update-slice" and place == 0 else whole

    def bytes_read(self, fused: str, place: int, whole: float) -> float:
        """Bytes that a fused computation reads of its parameter `place`."""
        names = {
            one.name
            for one in self.computations[fused].values()
            if one.opcode == "parameter" and one.rest.startswith(f"{place})")
        }
        total = 0.0
        for one in self.computations[fused].values():
            if one.opcode == "bitcast" and one.operands[0] in names:
                names.add(one.name)
                continue
            for position, name in enumerate(one.operands):
                if name in names:
                    inner = one.called("calls")
                    total += (
                        self.bytes_read(inner, position, whole)
                        if inner
                        else self._read(one, position, whole)
                    )
        return min(total, whole)
