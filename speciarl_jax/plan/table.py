"""The plan as text: one Markdown table and a few lines, on a terminal and in docs/scale.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

_SHORT = {
    "all-reduce": "AR",
    "all-gather": "AG",
    "reduce-scatter": "RS",
    "all-to-all": "A2A",
    "collective-permute": "CP",
}
_HEADER = (
    "program",
    "arguments",
    "temporaries",
    "others",
    "peak GiB",
    "TFLOP",
    "GB",
    "wire GB",
    "seconds",
    "MFU <=",
    "collectives",
    "largest in a loop",
    "copied around",
    "compile s",
)


class StepRow(TypedDict):
    """`traffic.StepTraffic`."""

    moved: dict[str, int]
    needed: dict[str, int]
    launches: int


class ProgramRow(TypedDict):
    """One program of a plan; how long it takes is known for the largest shapes only.

    ``step`` is there for decoding compiled for GPU.
    """

    name: str
    arguments_gib: float
    temporaries_gib: float
    others_gib: float
    peak_gib: float
    collectives: dict[str, int]
    in_loop_mib: float
    in_loop_kind: str
    around_mib: float
    compile_s: float
    fits: bool
    tflops_per_device: NotRequired[float]
    memory_gb_per_device: NotRequired[float]
    wire_gb_per_device: NotRequired[float]
    seconds: NotRequired[float]
    mfu_bound: NotRequired[float]
    step: NotRequired[StepRow]


class DecodingRow(TypedDict):
    """The decode loop over a step: seconds by three compiled sizes, or by what must move."""

    steps: int
    calls: int
    step_ms: float
    waves: int
    parked: int
    parked_at_worst: int
    launches: int
    hops: int
    is_compiled: bool


class Totals(TypedDict):
    """The whole run: hours, chip-hours, cost and judge calls are of training and evaluations."""

    step_s: float
    mfu_bound: float
    num_steps: int
    train_hours: float
    eval_hours: float
    hours: float
    chip_hours: float
    cost: float
    price_per_chip_hour: float
    judge_calls_per_step: int
    judge_calls_by_evaluations: int
    judge_calls_per_run: int
    judge_calls_per_s: float


class Plan(TypedDict):
    """What ``plan --json`` prints."""

    recipe: str
    model: str
    topology: str
    num_devices: int
    num_hosts: int
    usable_gib: float
    mesh: dict[str, int]
    remat: str
    shapes: dict[str, int]
    programs: list[ProgramRow]
    fits: bool
    decoding: DecodingRow
    totals: Totals
    caveat: str
    flags: NotRequired[str]


def plan_text(plan: Plan) -> str:
    """The whole plan, ready to print."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    shapes = plan["shapes"]
    lines = [
        f"{plan['recipe']} ({plan['model']}) on {plan['topology']}: {plan['num_devices']} devices "
        f"on {plan['num_hosts']} hosts, mesh {mesh}, remat {plan['remat']}",
        f"largest shapes: prompt {shapes['prompt_tokens']} tokens, image {shapes['windows']} "
        f"windows, {shapes['group_size']} answers of up to {shapes['completion_tokens']} tokens; "
        f"a host samples {shapes['wave_prompts']} prompts at once, {shapes['num_waves']} waves a "
        f"step; an update is {shapes['num_micro']} micro-batches of {shapes['micro_prompts']} "
        f"prompts, {shapes['num_updates']} updates a step",
        "",
        *_markdown(_HEADER, [_cells(row) for row in plan["programs"]]),
        "",
        _verdict(plan),
        _decoding_line(plan["decoding"]),
        *_total_lines(plan["totals"]),
        *(_step_line(row["name"], row["step"]) for row in plan["programs"] if "step" in row),
    ]
    if plan["caveat"]:
        lines.append(f"caveat: {plan['caveat']}")
    return "\n".join(lines)


def scale_table(plan: Plan) -> str:
    """The same as a section of docs/scale.md."""
    title, shapes, *rest = plan_text(plan).splitlines()
    _, _, after = title.partition(": ")
    head = f"### `{plan['recipe']}` on {plan['topology']}"
    places = [place for place, line in enumerate(rest) if line.startswith("|")]
    tail = [f"- {line}" for line in rest[places[-1] + 1 :] if line]
    return "\n".join([head, "", f"{after}; {shapes}.", *rest[: places[-1] + 1], "", *tail])


def _cells(row: ProgramRow) -> list[str]:
    work = ["", "", "", "", ""]
    if "seconds" in row:
        work = [
            f"{row['tflops_per_device']:.4g}",
            f"{row['memory_gb_per_device']:.4g}",
            f"{row['wire_gb_per_device']:.3g}",
            f"{row['seconds']:.3g}",
            f"{row['mfu_bound']:.0%}",
        ]
    calls = " ".join(f"{_SHORT[kind]} {n}" for kind, n in sorted(row["collectives"].items()))
    return [
        row["name"],
        f"{row['arguments_gib']:.2f}",
        f"{row['temporaries_gib']:.2f}",
        f"{row['others_gib']:.2f}",
        f"{row['peak_gib']:.2f}" + ("" if row["fits"] else " TOO LARGE"),
        *work,
        calls or "-",
        f"{_SHORT[row['in_loop_kind']]} {row['in_loop_mib']:.1f} MiB"
        if row["in_loop_kind"]
        else "-",
        f"{row['around_mib']:.0f} MiB",
        f"{row['compile_s']:.0f}",
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = (cell.rjust(n) for cell, n in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *others])} |"

    rule = "|" + "|".join("-" * (n + 1) + (":" if i else "-") for i, n in enumerate(widths)) + "|"
    return [line(header), rule, *(line(row) for row in rows)]


def _verdict(plan: Plan) -> str:
    worst = max(plan["programs"], key=lambda row: (not row["fits"], row["peak_gib"]))
    says = "fits" if plan["fits"] else "does NOT fit"
    return (
        f"{says}: {worst['name']} needs {worst['peak_gib']:.2f} of {plan['usable_gib']:.2f} usable "
        "GiB a device"
    )


def _decoding_line(row: DecodingRow) -> str:
    how = "the HLO of three sizes" if row["is_compiled"] else "what must move, not HLO"
    return (
        f"decoding: {row['steps']} steps of {row['step_ms']:.2f} ms in {row['calls']} calls and "
        f"{row['waves']} waves ({how}), {row['parked']} halves of a batch wait on the host, "
        f"{row['parked_at_worst']} if every answer reaches its limit; a step starts "
        f"{row['launches']} kernels, its transfers take {row['hops']} hops one after the other"
    )


def _step_line(name: str, step: StepRow) -> str:
    def total(parts: dict[str, int]) -> str:
        each = ", ".join(f"{kind} {amount / 1e9:.2f}" for kind, amount in parts.items())
        return f"{sum(parts.values()) / 1e9:.2f} GB ({each})"

    return (
        f"one step of {name} at all its rows and columns moves {total(step['moved'])} in "
        f"{step['launches']} launches; it must move {total(step['needed'])}"
    )


def _total_lines(totals: Totals) -> list[str]:
    lines = [
        f"at least {totals['step_s']:.1f} s a step (MFU at most {totals['mfu_bound']:.0%}), "
        f"{totals['train_hours']:.1f} h for {totals['num_steps']} steps and "
        f"{totals['eval_hours']:.1f} h for evaluations: {totals['hours']:.1f} h, "
        f"{totals['chip_hours']:.0f} chip-hours; checkpoints come on top",
        f"judge: {totals['judge_calls_per_step']} calls a step, "
        f"{totals['judge_calls_by_evaluations']} for evaluations, "
        f"{totals['judge_calls_per_run']} in all, up to {totals['judge_calls_per_s']:.0f} a second "
        "of training; its cache saves repeats",
    ]
    if totals["price_per_chip_hour"]:
        lines.append(
            f"cost: at least {totals['cost']:.0f} at {totals['price_per_chip_hour']:g} per "
            "chip-hour, judge not included"
        )
    return lines
