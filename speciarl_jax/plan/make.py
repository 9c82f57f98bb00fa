"""A recipe on a topology: mesh, shapes, compiled programs, totals."""

from __future__ import annotations

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config, MeshConfig
from speciarl_jax.devices.mesh import check_mesh, choose_mesh, make_mesh
from speciarl_jax.plan.chips import GIB, Topology
from speciarl_jax.plan.decode_cost import Compiled, Cost
from speciarl_jax.plan.exams import exam_rounds, exam_seconds
from speciarl_jax.plan.measure import Measured, measure
from speciarl_jax.plan.models import planned_arch
from speciarl_jax.plan.programs import (
    AbstractSession,
    Program,
    abstract_session,
    decode_program,
    decode_programs,
    device_bytes,
    encode_program,
    largest_size,
    learning_programs,
    prefill_program,
    step_programs,
)
from speciarl_jax.plan.shapes import StepShapes, all_shapes, plan_shapes, rollout_shape
from speciarl_jax.plan.table import DecodingRow, Plan, ProgramRow, Totals
from speciarl_jax.plan.work import Layout, Work, decode_calls, decode_steps, step_work
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import abstract_policy, count_parameters
from speciarl_jax.rollout import layout
from speciarl_jax.rollout.placement import Placement

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Planned:
    """A recipe on a topology, nothing compiled yet.

    Attributes:
        config: with the mesh that is used.
        shapes: the largest ones.
        caveat: what the figures do not say, "" if nothing.
    """

    config: Config
    topology: Topology
    session: AbstractSession
    shapes: StepShapes
    layout: Layout
    caveat: str = ""

    @property
    def sampling_shapes(self) -> StepShapes:
        """Those of all prompts that are sampled at a time, kept or not."""
        return dataclasses.replace(self.shapes, num_prompts=self.shapes.sampled_prompts)

    def work(self, cost: Cost | None = None) -> dict[str, Work]:
        """Work of each program; `cost` as of `work.step_work`."""
        arch, chip = self.session.arch, self.topology.chip
        return step_work(self.config, arch, self.shapes, self.layout, chip, cost)


def open_plan(config: Config, topology: Topology) -> Planned:
    """Lays a recipe out on a topology.

    Raises:
        ValueError: unknown model, or a mesh or batch that does not fit the devices.
    """
    arch = planned_arch(config.model.path)
    if config.mesh.auto:
        config = dataclasses.replace(config, mesh=_choose_mesh(config, arch, topology))
    mesh = make_mesh(config.mesh, topology.devices)
    check_mesh(mesh, arch)
    is_job = _samples_as_one(config, topology)
    local_shape = MeshConfig(-1, mesh.shape["fsdp"], mesh.shape["tensor"])
    local = mesh if is_job else make_mesh(local_shape, topology.local_devices)
    session = abstract_session(config, arch, mesh, local)
    num_hosts, has_few = 1 if is_job else topology.num_hosts, Placement(mesh).has_few_sizes
    shapes = plan_shapes(config, arch, dict(mesh.shape), num_hosts, has_few)
    return Planned(config, topology, session, shapes, _layout(session), topology.caveat)


def _samples_as_one(config: Config, topology: Topology) -> bool:
    """Whether a sampling program spans the whole job, as ``rollout.scope`` says.

    Raises:
        ValueError: not, on several TPU hosts.
    """
    is_pod = topology.num_hosts > 1 and topology.chip.kind.startswith("TPU")
    if config.rollout.scope == "host" and is_pod:
        raise ValueError(
            f"rollout.scope=host on {topology.name}: libtpu refuses or crashes programs over a "
            "part of a slice (docs/scale.md); set rollout.scope=auto"
        )
    return config.rollout.scope == "job" or is_pod


def _choose_mesh(config: Config, arch: Arch, topology: Topology) -> MeshConfig:
    """As a run with ``mesh.auto`` would."""
    dtype = jnp.dtype(config.model.param_dtype)
    text = nnx.state(abstract_policy(arch, Dtypes(dtype, dtype)).text)
    num_bytes, chip = count_parameters(text) * dtype.itemsize, topology.chip
    counts = (len(topology.devices), len(topology.local_devices))
    mesh, reason = choose_mesh(arch, num_bytes, *counts, chip.usable_bytes)
    log(f"mesh.auto: {reason}")
    return mesh


def _layout(session: AbstractSession) -> Layout:
    trainable, frozen = session.parts.trainable, session.parts.frozen
    is_adapter = not session.config.model.train_base
    vision_bytes = device_bytes([part.get("visual", ()) for part in (trainable, frozen)])
    return Layout(
        **dict(session.mesh.shape),
        text_bytes=device_bytes((trainable, frozen)) - vision_bytes,
        vision_bytes=vision_bytes,
        adapter_bytes=device_bytes(trainable),
        adapter_params=count_parameters(trainable) if is_adapter else 0,
    )


def log(line: str) -> None:
    """Progress, on standard error; the parent process shows lines that start so."""
    print(f"plan: {line}", file=sys.stderr, flush=True)


def bucket_programs(planned: Planned) -> list[Program]:
    """Programs of the smaller buckets, named by their shapes; the largest are not repeated."""
    session, largest = planned.session, planned.shapes
    found: dict[str, Program] = {}

    def add(program: Program, what: str) -> None:
        name = f"{program.name} {what}"
        found.setdefault(name, dataclasses.replace(program, name=name))

    for shapes in all_shapes(planned.config, largest):
        prompt, width = f"S={shapes.prompt_tokens}", f"C={shapes.completion_tokens}"
        if shapes.windows < largest.windows:
            add(encode_program(session, shapes), f"W={shapes.windows}")
        if (shapes.prompt_tokens, shapes.windows) != (largest.prompt_tokens, largest.windows):
            add(prefill_program(session, shapes), f"{prompt} W={shapes.windows}")
        if shapes.windows == largest.windows and shapes != largest:
            for program in decode_programs(session, shapes) + learning_programs(session, shapes):
                add(program, f"{prompt} {width}")
    return list(found.values())


def make_plan(planned: Planned, *, has_all_buckets: bool, price: float) -> Plan:
    """Compiles the step and sums it up as plain data.

    Args:
        planned: from `open_plan`.
        has_all_buckets: the smaller shapes too.
        price: of one chip, money per hour; 0 if unknown.
    """
    programs = step_programs(planned.session, planned.shapes)
    programs += bucket_programs(planned) if has_all_buckets else []
    found = {program.name: _measured(planned, program) for program in programs}
    cost = decode_cost(planned, found["decode"])
    work = with_latency(planned, found, planned.work(cost))
    rows = [_row(planned, one, work.get(one.name)) for one in found.values()]
    return {
        "recipe": planned.config.name,
        "model": planned.config.model.path,
        "topology": planned.topology.name,
        "num_devices": len(planned.topology.devices),
        "num_hosts": planned.topology.num_hosts,
        "usable_gib": planned.topology.chip.usable_bytes / GIB,
        "mesh": dict(planned.session.mesh.shape),
        "remat": planned.config.model.remat,
        "shapes": dataclasses.asdict(planned.shapes) | {"num_waves": planned.shapes.num_waves},
        "programs": rows,
        "fits": all(row["fits"] for row in rows),
        "decoding": _decoding_row(planned, found["decode"], cost),
        "totals": _totals(planned, work, cost, price),
        "caveat": planned.caveat,
    }


def _measured(planned: Planned, program: Program) -> Measured:
    found = measure(program, _vocab_sizes(planned, program))
    log(f"{found.name}: {found.peak / GIB:.2f} GiB, compiled in {found.compile_s:.0f} s")
    return found


def decode_cost(planned: Planned, largest: Measured) -> Cost | None:
    """A decode step between three compiled sizes, the largest and two on an expected step's way.

    None if XLA refuses one of them; what must move is then counted.
    """
    shapes, limit = planned.shapes, planned.shapes.completion_tokens
    full = shapes.wave_shard_prompts * shapes.group_size
    rows, columns = layout.row_sizes(full, shapes.has_few_sizes), _columns(planned)
    sizes = {largest_size(planned.session, shapes): largest}
    for size in ((full, columns[:2][-1]), (rows[len(rows) * 2 // 3], limit)):
        if size not in sizes:
            probe = decode_program(planned.session, shapes, *size)
            name = f"decode {size[0]} rows, {size[1]} columns"
            sizes[size] = _measured(planned, dataclasses.replace(probe, name=name))
    if any(one.is_too_large for one in sizes.values()):
        return None
    return Compiled(tuple((*size, one.traffic) for size, one in sizes.items()))


def _columns(planned: Planned) -> list[int]:
    return rollout_shape(planned.config, planned.shapes, planned.layout.tensor).columns


def with_latency(
    planned: Planned, found: dict[str, Measured], work: dict[str, Work]
) -> dict[str, Work]:
    """Work whose seconds count the hops of transfers too; those of decoding are counted already."""
    shapes, hop_s = planned.shapes, planned.topology.chip.hop_s
    calls = {"prefill": shapes.num_waves, "update": shapes.num_updates}

    def slower(name: str, one: Work) -> Work:
        hops = found[name].traffic.loop_hops * calls.get(name, 1)
        return dataclasses.replace(one, seconds=one.seconds + hops * hop_s)

    return {name: one if name == "decode" else slower(name, one) for name, one in work.items()}


def _decoding_row(planned: Planned, largest: Measured, cost: Cost | None) -> DecodingRow:
    chip = planned.topology.chip
    parts = (planned.session.arch, planned.sampling_shapes, planned.layout, chip)
    steps = decode_steps(planned.config, *parts, cost)
    return {
        "steps": steps.num_steps,
        "calls": steps.num_calls,
        "step_ms": 1000 * steps.seconds / steps.num_steps,
        "waves": planned.shapes.num_waves,
        "parked": steps.num_parked,
        "parked_at_worst": _parked_at_worst(planned),
        "launches": largest.traffic.launches,
        "hops": largest.traffic.loop_hops,
        "is_compiled": cost is not None,
    }


def _parked_at_worst(planned: Planned) -> int:
    """Halves that wait on the host if every answer reaches its limit."""
    shapes, arch = planned.sampling_shapes, planned.session.arch
    lengths = np.full((shapes.num_prompts, shapes.group_size), shapes.completion_tokens)
    calls = decode_calls(planned.config, arch, shapes, planned.layout.tensor, lengths)
    return sum(call.parked for call in calls)


def _vocab_sizes(planned: Planned, program: Program) -> tuple[int, int] | None:
    """Columns of the logits, whole and on one device, where the traffic of decoding is read."""
    if not program.name.startswith("decode") or planned.topology.devices[0].platform != "gpu":
        return None
    size = planned.session.arch.text.vocab_size
    return size, size // planned.layout.tensor


def _row(planned: Planned, measured: Measured, work: Work | None) -> ProgramRow:
    chip = planned.topology.chip
    row: ProgramRow = {
        "name": measured.name,
        "arguments_gib": measured.arguments / GIB,
        "temporaries_gib": measured.temporaries / GIB,
        "others_gib": measured.others / GIB,
        "peak_gib": measured.peak / GIB,
        "collectives": measured.traffic.collectives,
        "in_loop_mib": measured.traffic.in_loop[0] / _MIB,
        "in_loop_kind": measured.traffic.in_loop[1],
        "around_mib": measured.traffic.around / _MIB,
        "compile_s": measured.compile_s,
        "fits": measured.fits(chip.usable_bytes),
    }
    if measured.step is not None:
        step = measured.step
        row["step"] = {"moved": step.moved, "needed": step.needed, "launches": step.launches}
    if work is not None:
        row |= {
            "tflops_per_device": work.hardware_flops / planned.layout.num_devices / 1e12,
            "memory_gb_per_device": work.device_bytes / 1e9,
            "wire_gb_per_device": work.wire_bytes / 1e9,
            "seconds": work.seconds,
            "mfu_bound": work.mfu_bound(chip, planned.layout.num_devices),
        }
    return row


def _totals(planned: Planned, work: dict[str, Work], cost: Cost | None, price: float) -> Totals:
    """Judge calls, seconds, hours and money of the training and of its evaluations."""
    train, shapes = planned.config.train, planned.shapes
    rounds = exam_rounds(planned.config)
    parts = (planned.session.arch, shapes, planned.layout, planned.topology.chip)
    eval_hours = exam_seconds(planned.config, rounds, *parts, cost) / 3600
    eval_calls = sum(one.answers for one in rounds)
    seconds = sum(one.seconds for one in work.values())
    calls = shapes.sampled_prompts * shapes.group_size
    train_hours, num_chips = seconds * train.num_steps / 3600, planned.layout.num_devices
    hours = train_hours + eval_hours
    model_flops = sum(one.model_flops for one in work.values())
    peak = planned.topology.chip.peak * num_chips
    return {
        "step_s": seconds,
        "mfu_bound": model_flops / (seconds * peak),
        "num_steps": train.num_steps,
        "train_hours": train_hours,
        "eval_hours": eval_hours,
        "hours": hours,
        "chip_hours": hours * num_chips,
        "cost": hours * num_chips * price,
        "price_per_chip_hour": price,
        "judge_calls_per_step": calls,
        "judge_calls_by_evaluations": eval_calls,
        "judge_calls_per_run": calls * train.num_steps + eval_calls,
        "judge_calls_per_s": calls / seconds,
    }
