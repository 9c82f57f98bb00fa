"""Validation pictures: a split of their own, or held out of training; never in both."""

import dataclasses

import pytest
from PIL import Image

from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data import recipe


def ids_of(source):
    return [source[i].prompt_id for i in range(len(source))]


def two_folders(root):
    """Two folders of pictures without a validation split, 24 and 16 to train on."""
    for name, per_class in (("birds", 15), ("dogs", 10)):
        for label in ("one", "two"):
            folder = root / name / label
            folder.mkdir(parents=True)
            for number in range(per_class):
                Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    return [f"folder:{root / name}" for name in ("birds", "dogs")]


def test_validation_pictures_are_held_out_of_training(tmp_path):
    birds, dogs = two_folders(tmp_path)
    data = DataConfig(source=birds, eval_sources=(birds, dogs), num_validation=6)
    training = ids_of(recipe.open_train_source(data))
    held_out = ids_of(recipe.open_validation_source(data, birds))
    everything = ids_of(recipe.open_train_source(dataclasses.replace(data, num_validation=0)))
    assert (len(training), len(held_out)) == (18, 6)
    assert sorted(training + held_out) == sorted(everything)
    assert len(ids_of(recipe.open_validation_source(data, dogs))) == 6  # of what nobody trains on
    test = ids_of(recipe.open_eval_source(data, birds, "test", 0))
    assert not set(test) & set(held_out)
    # The same by seed, another by another; classes and sizes of the training subset change nothing.
    for changes, is_same in (
        ({"num_train": 5}, True),
        ({"include_classes": ("one",)}, True),
        ({"select_seed": 7}, False),
    ):
        other = dataclasses.replace(data, **changes)
        found = ids_of(recipe.open_validation_source(other, birds))
        assert (found == held_out) is is_same
        assert not set(found) & set(ids_of(recipe.open_train_source(other)))


def test_a_training_subset_stays_what_it_was_before_anything_was_held_out(tmp_path):
    birds, _ = two_folders(tmp_path)
    data = DataConfig(source=birds, num_train=18)
    before = ids_of(recipe.open_train_source(data))
    assert ids_of(recipe.open_train_source(dataclasses.replace(data, num_validation=6))) == before
    with pytest.raises(ValueError, match="only 17 are available beside those held out"):
        recipe.open_train_source(dataclasses.replace(data, num_validation=7))
    with pytest.raises(ValueError, match=r"out of 24 leaves nothing .*lower data.num_validation"):
        recipe.open_train_source(dataclasses.replace(data, num_train=0, num_validation=24))


def test_each_part_of_a_mixture_gives_its_own(tmp_path):
    birds, dogs = two_folders(tmp_path)
    data = DataConfig(source=f"{birds} + {dogs}", num_validation=4, num_train=20)
    training = set(ids_of(recipe.open_train_source(data)))
    assert len(training) == 20
    for name in (birds, dogs):
        assert not training & set(ids_of(recipe.open_validation_source(data, name)))


def test_a_source_with_a_validation_split_gives_all_of_its_training_split(tmp_path):
    spec = "field_guide_birds:train=8,validation=5,test=2"
    data = DataConfig(source=spec, num_validation=3, data_dir=str(tmp_path))
    assert len(recipe.open_train_source(data)) == 8
    validation = ids_of(recipe.open_validation_source(data, spec))
    assert len(validation) == 3
    assert all("/validation/" in name for name in validation)


def test_without_a_split_or_a_number_the_remedy_is_named(tmp_path):
    birds, _ = two_folders(tmp_path)
    with pytest.raises(ValueError, match=r"'validation'; it has test, train; set data.num_valid"):
        recipe.open_validation_source(DataConfig(source=birds), birds)
