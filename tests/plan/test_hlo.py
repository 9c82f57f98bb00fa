"""The HLO reader on texts written by hand: what moves, how often, between whom."""

import jax
import jax.numpy as jnp
import pytest

from speciarl_jax.plan import hlo

# One decode step after the other (depth 1), four layers in each (depth 2). The caches are copied
# at entry and exit, the head of 8 x 100 is gathered from two devices in every step.
DECODE = """HloModule jit_decode, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%pick (stack: bf16[4,8,8], layer: s32[]) -> bf16[8,8] {
  %stack = bf16[4,8,8]{2,1,0} parameter(0)
  %layer = s32[] parameter(1)
  %one = bf16[1,8,8]{2,1,0} dynamic-slice(%stack, %layer), dynamic_slice_sizes={1,8,8}
  ROOT %flat = bf16[8,8]{1,0} bitcast(%one)
}

%product (x: bf16[2,8], weights: bf16[4,8,8], layer: s32[]) -> bf16[2,8] {
  %x = bf16[2,8]{1,0:S(1)} parameter(0)
  %weights = bf16[4,8,8]{2,1,0} parameter(1)
  %number = s32[] parameter(2)
  %kernel = bf16[8,8]{1,0} fusion(%weights, %number), kind=kLoop, calls=%pick
  ROOT %y = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} dot(%x, %kernel)
}

%write (cache: bf16[4,2,16], new: bf16[1,2,1], layer: s32[]) -> bf16[4,2,16] {
  %cache = bf16[4,2,16]{2,1,0} parameter(0)
  %new = bf16[1,2,1]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %put = bf16[4,2,16]{2,1,0} dynamic-update-slice(%cache, %new, %at)
}

%layers_left (state: (s32[], bf16[2,8], bf16[4,2,16])) -> pred[] {
  %state = (s32[], bf16[2,8]{1,0}, bf16[4,2,16]{2,1,0}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%index, %four), direction=LT
}

%one_layer (state.1: (s32[], bf16[2,8], bf16[4,2,16])) -> (s32[], bf16[2,8], bf16[4,2,16]) {
  %state.1 = (s32[], bf16[2,8]{1,0:S(1)}, bf16[4,2,16]{2,1,0}) parameter(0)
  %layer.1 = s32[] get-tuple-element(%state.1), index=0
  %hidden = bf16[2,8]{1,0:S(1)} get-tuple-element(%state.1), index=1
  %own = bf16[4,2,16]{2,1,0} get-tuple-element(%state.1), index=2
  %weights.1 = bf16[4,8,8]{2,1,0} constant({...})
  %fresh = bf16[1,2,1]{2,1,0} constant({...})
  %times = bf16[2,8]{1,0:S(1)} fusion(%hidden, %weights.1, %layer.1), kind=kOutput, calls=%product
  %all = bf16[2,8]{1,0:S(1)} all-reduce(%times), replica_groups=[2,2]<=[4], to_apply=%add
  %own.1 = bf16[4,2,16]{2,1,0} fusion(%own, %fresh, %layer.1), kind=kLoop, calls=%write
  ROOT %next = (s32[], bf16[2,8]{1,0:S(1)}, bf16[4,2,16]{2,1,0}) tuple(%layer.1, %all, %own.1)
}

%steps_left (loop: (bf16[4,2,16], bf16[8,50])) -> pred[] {
  %loop = (bf16[4,2,16]{2,1,0}, bf16[8,50]{1,0}) parameter(0)
  %zero = s32[] constant(0)
  ROOT %go = pred[] custom-call(%zero), custom_call_target="Any"
}

%one_step (loop.1: (bf16[4,2,16], bf16[8,50])) -> (bf16[4,2,16], bf16[8,50]) {
  %loop.1 = (bf16[4,2,16]{2,1,0}, /*index=1*/bf16[8,50]{1,0:T(8,128)(2,1)}) parameter(0)
  %cache.1 = bf16[4,2,16]{2,1,0} get-tuple-element(%loop.1), index=0
  %part = bf16[8,50]{1,0} get-tuple-element(%loop.1), index=1
  %head = (bf16[8,50]{1,0}, bf16[8,100]{1,0}) all-gather-start(%part), replica_groups={{0,1},{2,3}}
  %head.1 = bf16[8,100]{1,0} all-gather-done(%head)
  %hidden.1 = bf16[2,8]{1,0:S(1)} constant({...})
  %first = s32[] constant(0)
  %begin = (s32[], bf16[2,8]{1,0:S(1)}, bf16[4,2,16]{2,1,0}) tuple(%first, %hidden.1, %cache.1)
  %run = (s32[], bf16[2,8]{1,0:S(1)}, bf16[4,2,16]{2,1,0}) while(%begin), LAYERS
  %after = bf16[4,2,16]{2,1,0} get-tuple-element(%run), index=2
  ROOT %again = (bf16[4,2,16]{2,1,0}, bf16[8,50]{1,0}) tuple(%after, %part)
}

ENTRY %main (k: bf16[4,2,16], w: bf16[8,50]) -> bf16[4,2,16] {
  %k = bf16[4,2,16]{0,1,2} parameter(0)
  %w = bf16[8,50]{1,0} parameter(1)
  %in = bf16[4,2,16]{2,1,0} copy(%k)
  %enter = (bf16[4,2,16]{2,1,0}, bf16[8,50]{1,0}) tuple(%in, %w)
  %loops = (bf16[4,2,16]{2,1,0}, bf16[8,50]{1,0}) while(%enter), STEPS
  %done = bf16[4,2,16]{2,1,0} get-tuple-element(%loops), index=0
  ROOT %out = bf16[4,2,16]{0,1,2} copy(%done)
}
"""
DECODE = DECODE.replace("LAYERS", "condition=%layers_left, body=%one_layer")
DECODE = DECODE.replace("STEPS", "condition=%steps_left, body=%one_step")


@pytest.fixture(scope="module")
def decode():
    return hlo.parse(DECODE)


def test_collectives_know_their_loop_their_size_and_who_takes_part(decode):
    found = {one.kind: one for one in hlo.collectives(decode)}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.num_bytes, gather.size, gather.depth, gather.times) == (8 * 100 * 2, 2, 1, 1)
    assert (reduce.num_bytes, reduce.size, reduce.depth, reduce.times) == (2 * 8 * 2, 2, 2, 4)
    # A ring of two: a device sends half of what is gathered, and all of what is summed.
    assert (gather.wire_bytes, reduce.wire_bytes) == (800, 32)
    assert (gather.hops, reduce.hops) == (1, 2)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[16,4]<=[64]", 4),
        ("replica_groups=[4,16]<=[16,4]T(1,0)", 16),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}", 16),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=8], device_ids=([8,4]T(1,0)) {'a','b'}", 8),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size):
    text = DECODE.replace(
        "replica_groups={{0,1},{2,3}}", f"channel_id=1, {groups}, dimensions={{1}}"
    )
    gather = next(one for one in hlo.collectives(hlo.parse(text)) if one.kind == "all-gather")
    assert gather.size == size


@pytest.mark.parametrize(
    ("line", "wire"),
    [
        # Of a ring of four: the operand once, three quarters of it; 24 of 32 bytes a device.
        ("bf16[4]{0} reduce-scatter(%part), replica_groups=[1,4]<=[4]", 24),
        ("bf16[16]{0} all-to-all(%part), replica_groups=[1,4]<=[4]", 24),
        ("bf16[16]{0} collective-permute(%part), source_target_pairs={{0,1},{1,0}}", 32),
    ],
)
def test_wire_bytes_of_the_other_kinds(line, wire):
    gather = (
        "(bf16[8,50]{1,0}, bf16[8,100]{1,0}) all-gather-start(%part), replica_groups={{0,1},{2,3}}"
    )
    first = hlo.collectives(hlo.parse(DECODE.replace(gather, line)))[0]
    assert first.wire_bytes == wire


def test_copies_outside_of_the_loops_are_found(decode):
    found = [(run.depth, nbytes) for run, nbytes in hlo.copies(decode, at_least=200)]
    assert found == [(0, 4 * 2 * 16 * 2)] * 2
    assert hlo.copies(decode, at_least=257) == []


def test_traffic_of_a_step_by_hand(decode):
    """A product reads its layer's weights out of the stack, an update in place only what is new."""
    reads = {run.instruction.name: hlo.traffic(decode, run) for run in decode.runs}
    index = 4  # a layer's number, int32
    assert reads["times"] == 8 * 8 * 2 + index  # not the stack; what is in S(1) is free
    assert reads["own.1"] == 2 * 2 + 2 * 2 + index  # read new, write new
    assert reads["head"] == 8 * 50 * 2 + 8 * 100 * 2
    assert reads["run"] == reads["after"] == 0
    layer = reads["times"] + reads["own.1"] + reads["less"]
    assert hlo.loop_traffic(decode) == 4 * layer + reads["head"] + reads["go"]


def test_trip_counts_are_xlas_own_or_the_condition_s():
    module = hlo.parse(DECODE)
    inner = module.computations["one_step"].instructions["run"]
    outer = module.computations["main"].instructions["loops"]
    assert (hlo.trip_count(module, inner), hlo.trip_count(module, outer)) == (4, None)
    told = DECODE.replace(
        "body=%one_layer", 'body=%one_layer, backend_config={"known_trip_count":{"n":"7"}}'
    )
    module = hlo.parse(told)
    assert hlo.trip_count(module, module.computations["one_step"].instructions["run"]) == 7
    assert next(c.times for c in hlo.collectives(module) if c.kind == "all-reduce") == 7


def test_layouts_and_memory_spaces_are_read(decode):
    key = decode.computations["main"].instructions["k"].shapes[0]
    assert key.major_to_minor == (2, 1, 0)
    hidden = decode.computations["one_layer"].instructions["hidden"].shapes[0]
    assert (hidden.num_bytes, hidden.main_bytes) == (32, 0)
    assert hlo.Shape("pred", (3,)).num_bytes == 3
    assert hlo.Shape("f8e4m3fn", (3,)).num_bytes == 3
    assert hlo.Shape("s4", (3,)).num_bytes == 2
    assert hlo.Shape("token", ()).num_bytes == 0


def test_launches_count_kernels_of_a_step(decode):
    # layers: product, sum, write, comparison, four times; a gather and the loop's condition once
    assert hlo.launches(decode) == 4 * 4 + 2


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="without an ENTRY"):
        hlo.parse("HloModule nothing")


def test_a_compiled_scan_is_read():
    """XLA's own text: three scans of five products."""

    def body(x, w):
        return jnp.tanh(x @ w), None

    def steps(x, stack):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.scan(body, x, stack)[0], x)

    shapes = (
        jax.ShapeDtypeStruct((4, 64), jnp.float32),
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32),
    )
    module = hlo.parse(jax.jit(steps).lower(*shapes).compile().as_text())
    weights = 5 * 64 * 64 * 4
    # read in place, or cut out of the stack (read, written) and read
    assert 3 * weights < hlo.loop_traffic(module) < 10 * weights
    assert max(run.depth for run in module.runs) == 2
