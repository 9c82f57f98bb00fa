"""What is kept, what a full disk leaves, and that no damaged file of a checkpoint gets past."""

import dataclasses
import gc
import json
import random
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.run.checkpoint import Checkpoints
from speciarl_jax.run.hashes import hash_array, hash_json, hash_tree
from speciarl_jax.run.state import SavedRollouts, TrainState


def make_state(step, size=8):
    values = np.random.default_rng(step).random(size).astype(np.float32)
    counter = jnp.asarray(step, jnp.int32)
    optim = OptimState({"mu": jnp.ones(3)}, counter, jnp.zeros((), jnp.int32))
    return TrainState(nnx.State({"a": nnx.Param(jnp.asarray(values))}), optim, step, {"at": step})


def test_newest_and_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, 2, keep_best=1)
    for step, hm in enumerate([0.5, 0.9, 0.6, None, 0.7], start=1):
        store.save(make_state(step), hm)
    store.wait()
    assert store.steps() == [2, 4, 5]
    state, skipped = store.restore(make_state(0))
    assert (state.step, state.data, skipped) == (5, {"at": 5}, [])
    np.testing.assert_array_equal(
        state.trainable["a"].get_value(), make_state(5).trainable["a"].get_value()
    )
    store.close()


def test_the_best_is_kept_by_a_resumed_run_too(tmp_path):
    """Its score is on disk, not only in the process that saved it."""
    for step, hm in enumerate([0.9, 0.5, 0.6, 0.7], start=1):
        store = Checkpoints(tmp_path, 1, keep_best=1)
        store.save(make_state(step), hm)
        store.wait()
        assert store.steps() == sorted({1, step})
        store.close()


@pytest.mark.slow
def test_full_disk_leaves_the_earlier_checkpoints(tmp_path):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        store = Checkpoints(tmp_path / "run", 3)
        store.save(make_state(1))
        store.save(make_state(2, size=2_000_000))
        with pytest.raises(OSError, match=r"No space left.*steps \[1\] are intact"):
            store.wait()
        assert store.restore(make_state(0))[0].step == 1
        store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


SIZE = 3000  # more than fits into the index: the values lie in a data file of their own


@pytest.fixture
def loose_ends():
    """Orbax leaves tasks behind an error, which Python reports when they are collected: here."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()
    sys.unraisablehook = hook


def make_rollouts(step):
    tokens = np.random.default_rng(step).integers(0, 2**40, 900)
    return SavedRollouts({"tokens": tokens}, {"step": step, "origin": {"rows": [1, 2]}})


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    store = Checkpoints(folder, 3, keep_best=1)
    for step in (1, 2):
        state = dataclasses.replace(make_state(step, SIZE), rollouts=make_rollouts(step))
        store.save(state, 0.1 * step)
    store.wait()
    store.close()
    return folder


def leaves(state):
    arrays = [state.trainable["a"].get_value(), state.optim.inner["mu"], state.optim.num_updates]
    return [np.asarray(x) for x in (*arrays, state.rollouts.arrays["tokens"])]


def assert_whole(folder):
    """What is restored is one of the two saves, to the bit; which, and why not the newer."""
    store = Checkpoints(folder, 3, keep_best=1)
    state, skipped = store.restore(make_state(0, SIZE))
    store.close()
    saved = dataclasses.replace(make_state(state.step, SIZE), rollouts=make_rollouts(state.step))
    for got, expected in zip(leaves(state), leaves(saved), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert (state.data, state.rollouts.record) == (saved.data, saved.rollouts.record)
    return state.step, skipped


def files_of(folder, step=2):
    files = [file for file in (folder / str(step)).rglob("*") if file.is_file()]
    return sorted(files, key=lambda file: (file.stat().st_size, str(file)))


def damages(content, rng):
    """The content of a file after each accident."""
    size = len(content)
    yield from (content[:length] for length in {0, size // 2, max(size - 1, 0)})
    for place in rng.sample(range(size), 60 if b'"hashes"' in content else 3):
        flipped = content[place] ^ 1 << rng.randrange(8)
        yield content[:place] + bytes([flipped]) + content[place + 1 :]
    yield content[: size // 2] + bytes(size - size // 2)  # blocks that never reached the disk
    yield content + content


@pytest.mark.usefixtures("loose_ends")
def test_whatever_file_is_cut_or_flipped_only_what_was_saved_is_restored(two_saves, tmp_path):
    """Every file of a checkpoint, several accidents each, more of them to the position."""
    rng, steps = random.Random(0), []
    folder = tmp_path / "copy"
    shutil.copytree(two_saves, folder)
    for file in files_of(folder):
        content = file.read_bytes()
        for damage in damages(content, rng):
            file.parent.mkdir(exist_ok=True)  # a damaged score is deleted
            file.write_bytes(damage)
            step, skipped = assert_whole(folder)
            assert (step, len(skipped)) in ((2, 0), (1, 1))
            assert all(f"{folder}/2: cannot be read (" in line for line in skipped)
            assert not any("\n" in line or len(line) > 500 for line in skipped)
            steps.append(step)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        shutil.copytree(two_saves / "2" / "metrics", folder / "2" / "metrics", dirs_exist_ok=True)
    assert len(steps) > 200
    assert steps.count(1) > 100


@pytest.mark.usefixtures("loose_ends")
@pytest.mark.parametrize("item", ["state", "position", "rollouts"])
def test_parts_of_two_checkpoints_are_never_mixed(two_saves, tmp_path, item):
    folder = tmp_path / "copy"
    shutil.copytree(two_saves, folder)
    shutil.rmtree(folder / "2" / item)
    shutil.copytree(folder / "1" / item, folder / "2" / item)
    step, (reason,) = assert_whole(folder)
    assert step == 1
    assert "differs from what was saved" in reason or "position: of step 1" in reason


@pytest.mark.usefixtures("loose_ends")
def test_a_deleted_file_of_a_checkpoint_costs_that_checkpoint_at_most(two_saves, tmp_path):
    for number in range(len(files_of(two_saves))):
        folder = tmp_path / "copy"
        shutil.copytree(two_saves, folder)
        files_of(folder)[number].unlink()
        assert_whole(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "position",
    [[], "text", 3, {}, {"step": 2}, {"step": "2", "data": {}}, {"step": 2, "data": []}],
)
def test_a_position_of_the_wrong_form_is_skipped(two_saves, tmp_path, position):
    folder = tmp_path / "copy"
    shutil.copytree(two_saves, folder)
    (folder / "2" / "position" / "metadata").write_text(json.dumps(position))
    step, (reason,) = assert_whole(folder)
    assert step == 1
    assert "position: " in reason


def test_checkpoints_without_hashes_are_read_as_before(two_saves, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two_saves, folder)
    file = folder / "2" / "position" / "metadata"
    position = json.loads(file.read_text())
    del position["hash"], position["hashes"]
    position["rollouts"]["arrays"] = {k: v[:2] for k, v in position["rollouts"]["arrays"].items()}
    file.write_text(json.dumps(position))
    assert assert_whole(folder) == (2, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "int8"])
def test_a_hash_changes_with_any_element_and_its_place(dtype):
    values = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 5, 7)), dtype)
    (hashed,) = hash_tree({"a": values}).values()
    assert hash_tree({"a": values + 0 if dtype != "bool" else values})["a"] == hashed
    seen = {hashed}
    for place in np.ndindex(values.shape):
        other = np.asarray(values).copy()
        other[place] = 1 - other[place]
        seen.add(hash_tree({"a": jnp.asarray(other)})["a"])
    seen.add(hash_tree({"a": values[::-1]})["a"])
    seen.add(hash_tree({"a": values.transpose(2, 0, 1)})["a"])
    assert len(seen) == 3 * 5 * 7 + 3


def test_a_hash_sees_two_signs_that_flip():
    """Damages that cancel in a plain sum of the words do not cancel here."""
    values = np.random.default_rng(0).random(64).astype(np.float32)
    pairs = [values * np.where(np.isin(np.arange(64), (0, k)), -1, 1) for k in range(1, 64)]
    hashes = {hash_tree({"a": jnp.asarray(x, jnp.float32)})["a"] for x in (values, *pairs)}
    assert len(hashes) == 64


def test_a_hash_depends_on_no_layout():
    values = np.random.default_rng(0).random((16, 8)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    names = (("a", "b"), ("b", None), (None, None))
    places = [jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in names]
    trees = [{"x": {"y": jax.device_put(values, place)}} for place in places]
    assert len({hash_tree(tree)["x/y"] for tree in trees}) == 1


def test_host_values_have_a_hash_of_their_content():
    assert hash_json({"a": 1, "b": (2.5,)}) == hash_json({"b": [2.5], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
    array = np.arange(6)
    assert len({hash_array(x) for x in (array, array.astype(np.int32), array.reshape(2, 3))}) == 3
    assert hash_array(array[::2]) == hash_array(array[::2].copy())
