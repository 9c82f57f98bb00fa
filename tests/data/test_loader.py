"""The loader: order, exact resume, hosts, filters, shapes."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data.index import PixelCache, build_index
from speciarl_jax.data.loader import EpochPlan, host_rows, permutation


class Recorded:
    """A source on disk, as far as `build_index` can tell; counts reads."""

    def __init__(self, examples, name="one"):
        self.examples, self.name, self.reads = examples, name, 0

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.reads += 1
        return self.examples[index]

    def fingerprint(self):
        return self.name


@pytest.fixture(scope="module")
def examples(make_examples):
    return make_examples(23)


def _ids(loader, count=None):
    ids = []
    for batch in loader:
        ids += [p for p, real in zip(batch.prompt_ids, batch.is_real, strict=True) if real]
        if count is not None and len(ids) >= count:
            break
    loader.close()
    return ids


def test_permutation_is_pinned():
    """These numbers must never change: runs in the wild resume by them."""
    assert permutation(0, 0, 10).tolist() == PINNED
    assert sorted(permutation(3, 4, 1000)) == list(range(1000))
    assert permutation(0, 1, 10).tolist() != PINNED


PINNED = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


def test_epochs_are_permutations_and_differ(examples, builder, open_loader):
    loader = open_loader(examples, builder, 4, seed=5, num_epochs=3, drop_last=False)
    assert loader.num_batches == 18
    ids = _ids(loader)
    epochs = [ids[k * 23 : (k + 1) * 23] for k in range(3)]
    assert all(sorted(e) == sorted(x.prompt_id for x in examples) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_training_drops_evaluation_pads(examples, builder, open_loader):
    assert len(_ids(open_loader(examples, builder, 4, num_epochs=1))) == 20
    loader = open_loader(examples, builder, 8, shuffle=False, num_epochs=1)
    batches = list(loader)
    assert [int(b.is_real.sum()) for b in batches] == [8, 8, 7]
    assert {len(b.prompt_ids) for b in batches} == {8}
    assert [i for b in batches for i in b.prompt_ids][:23] == [e.prompt_id for e in examples]
    assert [b.global_index[0] for b in batches] == [0, 8, 16]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_order_does_not_depend_on_workers(num_workers, num_threads, examples, builder, open_loader):
    reference = _ids(open_loader(examples, builder, 4, seed=1, num_epochs=2))
    loader = open_loader(
        examples,
        builder,
        4,
        seed=1,
        num_epochs=2,
        num_workers=num_workers,
        num_threads=num_threads,
        prefetch_batches=3,
    )
    assert _ids(loader) == reference


@given(
    cuts=st.lists(st.integers(0, 4), max_size=6),
    batch_size=st.sampled_from([2, 4, 6]),
    seed=st.integers(0, 3),
    drop_last=st.booleans(),
    hosts=st.lists(st.sampled_from([1, 2]), min_size=7, max_size=7),
    threads=st.lists(st.sampled_from([0, 1, 3]), min_size=7, max_size=7),
)
@settings(deadline=None, max_examples=25)
def test_any_kill_and_resume_gives_the_same_prompts(
    cuts, batch_size, seed, drop_last, hosts, threads, examples, builder, open_loader
):
    """Each cut consumes some batches, saves, reads ahead or not, and is killed."""

    def start(host_count, num_threads):
        return [
            open_loader(
                examples,
                builder,
                batch_size,
                seed=seed,
                drop_last=drop_last,
                num_epochs=2,
                num_threads=num_threads,
                process_index=k,
                process_count=host_count,
            )
            for k in range(host_count)
        ]

    def take(loaders, count):
        """Rows of `count` batches, hosts side by side, as one global list."""
        rows = []
        for _ in range(count):
            parts = [next(loader, None) for loader in loaders]
            if parts[0] is None:
                return rows, True
            for part in parts:
                rows += zip(part.prompt_ids, part.global_index.tolist(), strict=True)
        return rows, False

    (whole,) = start(1, 2)
    expected, _ = take([whole], 10_000)
    seen: list = []
    state = None
    for cut, host_count, num_threads in zip([*cuts, 10_000], hosts, threads, strict=False):
        loaders = start(host_count, num_threads)
        for loader in loaders:
            if state is not None:
                loader.set_state(json.loads(state))
        rows, is_over = take(loaders, cut)
        seen += rows
        state = json.dumps(loaders[0].get_state())
        if not is_over:
            take(loaders, cut % 2)  # consumed after the save: lost with the kill
        for loader in loaders:
            loader.close()
        whole.close()
    assert seen == expected


def test_hosts_slice_batches(examples, builder, open_loader):
    whole = open_loader(examples, builder, 4, seed=2, num_epochs=1)
    parts = [
        open_loader(examples, builder, 4, seed=2, num_epochs=1, process_index=k, process_count=2)
        for k in range(2)
    ]
    for batch in whole:
        halves = [next(part) for part in parts]
        assert batch.prompt_ids == halves[0].prompt_ids + halves[1].prompt_ids
        joined = np.concatenate([half.global_index for half in halves])
        np.testing.assert_array_equal(batch.global_index, joined)


def test_resume_on_other_numbers_of_hosts(examples, builder, open_loader):
    """Two hosts take two batches, one host takes one, four hosts the rest: the same prompts."""

    def open_hosts(count):
        return [
            open_loader(
                examples, builder, 4, seed=7, num_epochs=2, process_index=k, process_count=count
            )
            for k in range(count)
        ]

    expected = [i for batch in open_hosts(1)[0] for i in batch.prompt_ids]
    seen, state = [], None
    for num_hosts, num_batches in ((2, 2), (1, 1), (4, 7)):
        hosts = open_hosts(num_hosts)
        for host in hosts:
            if state is not None:
                host.set_state(state)
        for _ in range(num_batches):
            parts = [next(host).prompt_ids for host in hosts]
            assert {len(part) for part in parts} == {4 // num_hosts}
            seen += [i for part in parts for i in part]
        states = [json.loads(json.dumps(host.get_state())) for host in hosts]
        assert all(other == states[0] for other in states)  # any host's will do
        state = states[0]
        for host in hosts:
            host.close()
    assert seen == expected


def test_last_batch_may_be_all_padding_on_a_host(examples, builder, open_loader):
    loaders = [
        open_loader(
            examples[:5],
            builder,
            4,
            shuffle=False,
            num_epochs=1,
            process_index=k,
            process_count=2,
        )
        for k in range(2)
    ]
    masks = [[b.is_real.tolist() for b in loader] for loader in loaders]
    assert masks == [[[True, True], [True, False]], [[True, True], [False, False]]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_shapes_announce_exactly_what_comes(shuffle, examples, builder, open_loader):
    options = {"seed": 3, "num_epochs": 2, "shuffle": shuffle, "drop_last": False}
    loader = open_loader(examples, builder, 3, **options)
    announced = loader.shapes(loader.num_batches)
    merge = builder.arch.vision.window_patches
    seen = {(b.tokens.shape[1], b.vision.patches.shape[1] // merge) for b in loader}
    assert seen == set(announced)


def test_state_of_other_data_is_refused(examples, builder, open_loader):
    state = open_loader(examples, builder, 4, seed=1).get_state()
    for other, field in (
        (open_loader(examples, builder, 4, seed=2), "seed"),
        (open_loader(examples, builder, 2, seed=1), "batch_size"),
        (open_loader(examples[:-1], builder, 4, seed=1), "data"),
        (open_loader(examples, builder, 4, seed=1, shuffle=False, drop_last=True), "is_shuffled"),
    ):
        with pytest.raises(ValueError, match=field):
            other.set_state(state)
    with pytest.raises(ValueError, match="multiple of 4"):
        open_loader(examples, builder, 4, seed=1).set_state({**state, "position": 3})
    with pytest.raises(ValueError, match="multiple of 4"):
        open_loader(examples, builder, 4, seed=1).set_state({**state, "position": None})


def test_bad_images_are_skipped_listed_and_budgeted(make_examples, builder, open_loader):
    examples = make_examples(20, bad=(3, 7))
    loader = open_loader(examples, builder, 2, num_epochs=1, bad_image_budget_frac=0.1)
    assert [s.image_name for s in loader.index.bad] == ["3.png", "7.png"]
    assert "cannot decode" in loader.index.bad[0].reason
    assert len(_ids(loader)) == 18
    with pytest.raises(ValueError, match=r"2 of 20 images.*3\.png.*7\.png"):
        open_loader(examples, builder, 2, bad_image_budget_frac=0.09)


def _index(source, builder, index_dir, **data):
    return build_index(source, builder, DataConfig(**data), PixelCache(0), index_dir)


def test_over_long_prompts_count_image_tokens(examples, builder, tmp_path):
    lengths = _index(examples, builder, tmp_path).num_tokens
    limit = int(np.median(lengths))
    index = _index(examples, builder, tmp_path, max_prompt_tokens=limit)
    assert index.num_tokens.max() <= limit
    assert len(index.over_long) == int((lengths > limit).sum()) > 0
    with pytest.raises(ValueError, match=r"shortest has \d+ tokens"):
        _index(examples, builder, tmp_path, max_prompt_tokens=5)
    assert not any(tmp_path.iterdir())  # a plain list has no fingerprint to keep an index under


def test_duplicate_ids_and_empty_sources_are_refused(examples, builder, tmp_path):
    with pytest.raises(ValueError, match="occurs twice"):
        _index([*examples, examples[0]], builder, tmp_path)
    with pytest.raises(ValueError, match="empty"):
        _index([], builder, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 24}, "only 23 usable"),
        ({"batch_size": 5, "process_count": 2}, "over 2 hosts"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index=2"),
    ],
)
def test_sizes_that_do_not_fit(options, message, examples, builder, open_loader):
    with pytest.raises(ValueError, match=message):
        open_loader(examples, builder, **options)


def test_index_is_kept_on_disk_and_mended(examples, builder, tmp_path):
    first = Recorded(examples)
    index = _index(first, builder, tmp_path)
    again = Recorded(examples)
    kept = _index(again, builder, tmp_path)
    assert again.reads == 0
    np.testing.assert_array_equal(kept.kept, index.kept)
    assert kept.fingerprint == index.fingerprint
    (file,) = tmp_path.iterdir()
    file.write_text("[[1, 2")
    damaged = Recorded(examples)
    _index(damaged, builder, tmp_path)
    assert damaged.reads == len(examples)


def test_cache_respects_its_budget_and_saves_decoding(examples, builder, open_loader, tmp_path):
    cache = PixelCache(50_000)
    build_index(examples, builder, DataConfig(), cache, tmp_path)
    assert 0 < cache.used_bytes <= 50_000
    options = {"seed": 1, "num_epochs": 2}
    with_cache = [b.vision.patches for b in open_loader(examples, builder, 4, **options)]
    without = open_loader(examples, builder, 4, cache_mb=0, **options)
    for expected, batch in zip(with_cache, without, strict=True):
        np.testing.assert_array_equal(batch.vision.patches, expected)


def test_the_next_batch_is_made_while_the_step_runs(examples, builder, open_loader):
    source = Recorded(examples)
    loader = open_loader(source, builder, 4, cache_mb=0)
    next(loader)
    deadline = time.monotonic() + 30
    while source.reads < len(examples) + 8 and time.monotonic() < deadline:
        time.sleep(0.01)  # the consumer is busy elsewhere
    loader.close()
    assert source.reads >= len(examples) + 8  # the scan, this batch, and at least one more
    assert loader.wait_s > 0


def test_plan_arithmetic():
    plan = EpochPlan(num_prompts=10, batch_size=4, seed=0, is_shuffled=True, drop_last=True)
    assert plan.batches_per_epoch == 2
    assert plan.locate(7) == (0, 7)
    assert plan.locate(8) == (1, 0)
    padded = EpochPlan(num_prompts=10, batch_size=4, seed=0, is_shuffled=False, drop_last=False)
    assert padded.batches_per_epoch == 3
    assert padded.locate(11) == (0, 11)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_mini_batches_hold_the_same_prompts_on_any_number_of_hosts(hosts):
    rows = [host_rows(16, k, hosts, num_blocks=2) for k in range(hosts)]
    half = 8 // hosts
    assert {int(row) for part in rows for row in part[:half]} == set(range(8))
    assert {int(row) for part in rows for row in part[half:]} == set(range(8, 16))
