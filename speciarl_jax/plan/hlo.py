"""Reads the HLO text of a compiled program: what moves, how often, and between whom. No jax.

A program is an entry computation whose instructions run one after the other. ``while`` names the
computations of its condition and body, ``fusion`` the one that is fused into a single kernel.

    ENTRY main          depth 0   copies at a loop's entry and exit
      while body        depth 1   one decode step
        while body      depth 2   one layer, as often as the trip count says

Bytes are of the arrays as their shapes say, on one device, without the padding of tiles. Only main
memory counts: what lies in the small memory of a TPU's core (``S(1)`` in its layout) or with the
host is free.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) [({]")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:?=?\{"?n"?:"?(\d+)')
# {{0,1},{2,3}}, [2,4]<=[8] (groups, size), mesh['a'=4,'b'=2] {'a'}
_GROUPS = re.compile(
    r"replica_groups=(\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{")
# Instructions that are no kernel: they name, order or alias what others have written.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "opt-barrier", "domain"),
}
_ALIASES = {"bitcast", "reshape", "copy", "transpose", "convert"}  # of a parameter, when fused
_LOOKS = {"dynamic-slice", "slice", "gather"}  # read what they return, not their first operand


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
        dtype: as HLO spells it, ``bf16``.
        dims: its sizes.
        layout: dimensions from the fastest to the slowest, as HLO writes them; () if it does not.
        space: of memory; 0 is the main one.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()
    space: int = 0

    @property
    def num_bytes(self) -> int:
        """Without the padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        bits = 8 if self.dtype == "pred" else int(digits[0]) if digits else 0
        return -(-math.prod(self.dims) * bits // 8)

    @property
    def main_bytes(self) -> int:
        """The same, 0 outside the main memory."""
        return 0 if self.space else self.num_bytes

    @property
    def major_to_minor(self) -> tuple[int, ...]:
        """Dimensions from the slowest to the fastest."""
        return self.layout[::-1]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        shapes: of the result; several if it is a tuple, nested ones flattened.
        operands: names in the same computation.
        called: computations by their role: condition, body, calls, ...
        text: all after the result's shape.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: tuple[tuple[str, str], ...]
    text: str

    def calls(self, role: str) -> str:
        """The computation in a role, "" if there is none."""
        return dict(self.called).get(role, "")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in their order; `root` names the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """By their number."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.text.split("(")[1].split(")")[0]))


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def runs(self) -> list[Run]:
        """Every instruction that runs, loops and calls followed, fusions not taken apart."""
        return list(_walk(self, self.entry, 0, 1))


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction where it runs.

    Attributes:
        depth: loops around it.
        times: how often in one call of the program; a loop whose trip count XLA does not know, as
            that of the decode steps, counts once, so that figures are of one of its steps.
    """

    instruction: Instruction
    computation: Computation
    depth: int
    times: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
        kind: ``all-gather`` and so on, without ``-start``.
        num_bytes: of the whole array: what is gathered, summed or scattered.
        size: devices that take part.
        depth, times: as of `Run`.
        name: of the instruction.
    """

    kind: str
    num_bytes: int
    size: int
    depth: int
    times: int
    name: str

    @property
    def wire_bytes(self) -> float:
        """What one device sends on a ring."""
        if self.kind == "collective-permute":
            return self.num_bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.size - 1) / self.size * self.num_bytes

    @property
    def hops(self) -> int:
        """Steps one after the other on a ring that is used in both directions."""
        if self.kind == "collective-permute":
            return 1
        return (2 if self.kind == "all-reduce" else 1) * (self.size // 2)


def parse(text: str) -> Module:
    """The computations of an HLO text.

    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, root, lines = head[2], "", {}
            entry = name if head[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, lines, root)
            name = ""
        elif name and (found := _LINE.match(line)):
            lines[found[2]] = _instruction(found[2], line[found.end() :])
            root = found[2] if found[1] else root
    if not entry:
        raise ValueError("an HLO text without an ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _matching(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes, call = _shapes(rest[:end]), rest[end:].lstrip()
    bracket = call.index("(")
    last = _matching(call, bracket)
    operands, after = call[bracket:last], call[last:]
    called = [(role, target) for role, target in _CALLED.findall(after)]
    if branches := _BRANCHES.search(after):
        called += [("branch", one) for one in re.findall(r"[\w.\-]+", branches[1])]
    opcode = call[:bracket]
    return Instruction(name, opcode, shapes, tuple(_OPERAND.findall(operands)), tuple(called), call)


def _matching(text: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    raise ValueError(f"HLO with an open bracket: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(one.lstrip("<=")) for one in dims.split(",") if one)
        order = layout.split(":")[0]
        space = re.search(r"S\((\d+)\)", layout)
        place = int(space[1]) if space else 0
        minor = tuple(int(one) for one in order.split(",") if one.strip().isdigit())
        found.append(Shape(dtype, sizes, minor, place))
    return tuple(found)


def _walk(module: Module, name: str, depth: int, times: int) -> Iterator[Run]:
    computation = module.computations[name]
    for one in computation.instructions.values():
        yield Run(one, computation, depth, times)
        if one.opcode == "while":
            inner = times * (trip_count(module, one) or 1)
            for role in ("condition", "body"):
                yield from _walk(module, one.calls(role), depth + 1, inner)
        elif one.opcode in ("call", "conditional", "async-start"):
            for _, target in one.called:
                yield from _walk(module, target, depth, times)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a ``while`` runs: as XLA says, or the constant that its counter is compared with.

    The counter is taken to start at 0 and to go up by one, as those of ``scan`` do.
    """
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    condition = module.computations[loop.calls("condition")]
    root = condition.instructions[condition.root]
    if root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    for operand in root.operands:
        constant = condition.instructions[operand]
        if constant.opcode == "constant":
            return int(constant.text.split("(")[1].split(")")[0])
    return None


def collectives(module: Module) -> list[Collective]:
    """All transfers between devices, those within fusions too."""
    found = []
    for run in module.runs:
        inside = [run.instruction]
        if run.instruction.opcode == "fusion":
            target = module.computations[run.instruction.calls("calls")]
            inside = list(target.instructions.values())
        for one in inside:
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                size = _group_size(one)
                nbytes = _collective_bytes(one, kind, size)
                found.append(Collective(kind, nbytes, size, run.depth, run.times, one.name))
    return found


def _group_size(one: Instruction) -> int:
    if _PAIRS.search(one.text):
        return 2
    found = _GROUPS.search(one.text)
    if not found:
        return 1
    if found[4] is not None:  # a mesh of named axes, and those that take part
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[4]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[5]))
    return int(found[3]) if found[3] else len(found[2].split(","))


def _collective_bytes(one: Instruction, kind: str, size: int) -> int:
    total = sum(shape.num_bytes for shape in _results(one))
    return total * size if kind == "reduce-scatter" else total


def _results(one: Instruction) -> tuple[Shape, ...]:
    """What an instruction makes; the tuple of some ``-start`` begins with their operands."""
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        return (max(one.shapes, key=lambda shape: shape.num_bytes),)
    return one.shapes


def copies(module: Module, at_least: int = 2**20) -> list[tuple[Run, int]]:
    """Whole arrays of `at_least` bytes that are written a second time in the main memory."""
    return [
        (run, nbytes)
        for run in module.runs
        if run.instruction.opcode in ("copy", "copy-start")
        and (nbytes := run.instruction.shapes[0].main_bytes) >= at_least
    ]


def is_kernel(one: Instruction) -> bool:
    """Whether an instruction computes or moves: names, aliases and the ends of transfers do not."""
    return one.opcode not in _FREE and not one.opcode.endswith("-done")


def traffic(module: Module, run: Run) -> int:
    """Bytes that one execution reads from and writes to the main memory."""
    if not is_kernel(run.instruction) or run.instruction.opcode == "async-start":
        return 0
    reads, written = parts(module, run.computation, run.instruction)
    return sum(reads) + written


def parts(module: Module, computation: Computation, one: Instruction) -> tuple[list[int], int]:
    """(bytes that a kernel reads of each operand, bytes that it writes), in the main memory."""

    def size(name: str) -> int:
        return sum(shape.main_bytes for shape in computation.instructions[name].shapes)

    whole = [size(name) for name in one.operands]
    if one.opcode == "fusion":
        inner = module.computations[one.calls("calls")]
        reads = [_read(module, inner, number, nbytes) for number, nbytes in enumerate(whole)]
        return reads, _written(module, inner, one)
    if one.opcode == "copy-start":
        return whole, one.shapes[0].main_bytes
    if one.opcode == "slice-start":
        chunk = one.shapes[-2] if len(one.shapes) > 2 else one.shapes[-1]
        return [chunk.num_bytes], chunk.main_bytes
    written = sum(shape.main_bytes for shape in _results(one))
    if one.opcode in _LOOKS:
        looked = sum(shape.num_bytes for shape in one.shapes)
        return [min(looked, whole[0]), *whole[1:]], written
    if one.opcode in ("dynamic-update-slice", "scatter"):
        place = 1 if one.opcode == "dynamic-update-slice" else len(whole) - 1
        return [nbytes * (n == place) for n, nbytes in enumerate(whole)], whole[place]
    return whole, written


def _read(module: Module, inner: Computation, number: int, whole: int) -> int:
    """Bytes of parameter `number`, `whole` in all, that a fused computation looks at."""
    names, looked = {inner.parameters[number].name}, 0
    for one in inner.instructions.values():
        for place, operand in enumerate(one.operands):
            if operand not in names:
                continue
            if one.opcode in _ALIASES and one.name != inner.root:
                names.add(one.name)
            elif one.opcode in _LOOKS and place == 0:
                looked += sum(shape.num_bytes for shape in one.shapes)
            elif one.opcode == "dynamic-update-slice" and place == 0:
                continue  # written in place
            elif one.opcode == "fusion":
                looked += _read(module, module.computations[one.calls("calls")], place, whole)
            else:
                return whole
    return min(looked, whole)


def _written(module: Module, inner: Computation, one: Instruction) -> int:
    """Bytes that a fusion writes: of an update in place only the update."""
    root = inner.instructions[inner.root]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    pairs = zip(names, one.shapes, strict=True)
    return sum(_update_bytes(module, inner, name, shape) for name, shape in pairs)


def _update_bytes(module: Module, inner: Computation, name: str, shape: Shape) -> int:
    made = inner.instructions[name]
    while made.opcode in ("bitcast", "reshape", "copy") and made.operands:
        made = inner.instructions[made.operands[0]]
    if made.opcode == "dynamic-update-slice" and shape.main_bytes:
        return sum(x.num_bytes for x in inner.instructions[made.operands[1]].shapes)
    if made.opcode == "fusion":
        deeper = module.computations[made.calls("calls")]
        return _update_bytes(module, deeper, deeper.root, shape)
    return shape.main_bytes


def loop_traffic(module: Module) -> int:
    """Bytes of the main memory that pass in the loops; see `Run` for how often they are counted."""
    return sum(run.times * traffic(module, run) for run in module.runs if run.depth)


def launches(module: Module) -> int:
    """Kernels that the loops start; see `Run` for how often they are counted."""
    return sum(run.times for run in module.runs if run.depth and is_kernel(run.instruction))
