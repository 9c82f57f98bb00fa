"""A recipe on a topology: mesh, shapes, compiled programs, totals."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config, MeshConfig
from speciarl_jax.devices.mesh import check_mesh, choose_mesh, make_mesh
from speciarl_jax.plan.chips import GIB, HOST_CAVEAT, Topology
from speciarl_jax.plan.exams import exam_rounds, exam_seconds
from speciarl_jax.plan.measure import Measured, measure
from speciarl_jax.plan.models import planned_arch
from speciarl_jax.plan.programs import (
    AbstractSession,
    Program,
    abstract_session,
    decode_programs,
    device_bytes,
    encode_program,
    learning_programs,
    prefill_program,
    step_programs,
)
from speciarl_jax.plan.shapes import StepShapes, all_shapes, plan_shapes
from speciarl_jax.plan.table import Plan, ProgramRow, Totals
from speciarl_jax.plan.work import Layout, Work, step_work
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import abstract_policy, count_parameters
from speciarl_jax.rollout.placement import Placement


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

    def work(self) -> dict[str, Work]:
        """Work of each program."""
        arch, chip = self.session.arch, self.topology.chip
        return step_work(self.config, arch, self.shapes, self.layout, chip)


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
    local_shape = MeshConfig(-1, mesh.shape["fsdp"], mesh.shape["tensor"])
    local_devices, caveat = _sampling_devices(config, topology, dict(mesh.shape))
    local = make_mesh(local_shape, local_devices)
    session = abstract_session(config, arch, mesh, local)
    shapes = plan_shapes(config, arch, dict(mesh.shape), topology.num_hosts)
    return Planned(config, topology, session, shapes, _layout(session), caveat)


def _sampling_devices(
    config: Config, topology: Topology, mesh: dict[str, int]
) -> tuple[tuple[jax.Device, ...], str]:
    """What a process samples on, and what is to be said about it."""
    has_collectives = config.rollout.early_exit or mesh["fsdp"] * mesh["tensor"] > 1
    on_part = topology.chip.on_part
    if not topology.host_devices or (on_part == "no_collectives" and not has_collectives):
        return topology.local_devices, topology.caveat
    return topology.host_devices, HOST_CAVEAT


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

    has_few_sizes = Placement(session.local).has_few_sizes
    for shapes in all_shapes(planned.config, largest, has_few_sizes):
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
    work = planned.work()
    programs = step_programs(planned.session, planned.shapes)
    rows = []
    for program in [*programs, *(bucket_programs(planned) if has_all_buckets else [])]:
        found = measure(program, _vocab_sizes(planned, program))
        log(f"{found.name}: {found.peak / GIB:.2f} GiB, compiled in {found.compile_s:.0f} s")
        rows.append(_row(planned, found, work.get(found.name)))
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
        "totals": _totals(planned, work, price),
        "caveat": planned.caveat,
    }


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
        "collectives": measured.collectives,
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


def _totals(planned: Planned, work: dict[str, Work], price: float) -> Totals:
    """Judge calls, seconds, hours and money of the training and of its evaluations."""
    train, shapes = planned.config.train, planned.shapes
    rounds = exam_rounds(planned.config)
    parts = (planned.session.arch, shapes, planned.layout, planned.topology.chip)
    eval_hours = exam_seconds(planned.config, rounds, *parts) / 3600
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
