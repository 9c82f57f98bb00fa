"""How the six benchmarks lie on disk: annotation files to lists of (image, label, key).

Readers search for files by the end of their path, so that it does not matter whether a mirror
packed the official folder inside another one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeAlias

import numpy as np

from speciarl_jax.data.sources.archives import FileTree
from speciarl_jax.files import read_json
from speciarl_jax.types import IMAGE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a benchmark.

    Attributes:
        path: the file, or None if the archive lacks it.
        label: cleaned class name.
        name: key, unique within the split; the official relative path.
    """

    path: pathlib.Path | None
    label: str
    name: str


Splits = dict[str, list[Entry]]
MatValue: TypeAlias = Any  # an array, or scipy's mat_struct with the fields its file names
Reader = Callable[[FileTree], Splits]


def clean_label(text: str) -> str:
    """``001.Black_footed_Albatross`` -> ``Black footed Albatross``."""
    number, dot, rest = text.partition(".")
    name = rest if dot and number.isdigit() else text
    return " ".join(name.replace("_", " ").split())


def _lines(path: pathlib.Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _table(path: pathlib.Path) -> dict[str, str]:
    """Lines of ``KEY VALUE`` as a dictionary."""
    return dict(line.split(maxsplit=1) for line in _lines(path))


def read_cub(tree: FileTree) -> Splits:
    """CUB-200-2011: ``images.txt``, ``train_test_split.txt``, ``images/CLASS/FILE.jpg``."""
    hint = "pass CUB_200_2011.tgz"
    images = _table(tree.need("images.txt", hint))
    is_train = _table(tree.need("train_test_split.txt", hint))
    splits: Splits = {"train": [], "test": []}
    for number, relative in images.items():
        entry = Entry(
            tree.find(f"images/{relative}"), clean_label(relative.split("/")[0]), relative
        )
        splits["train" if is_train[number] == "1" else "test"].append(entry)
    return splits


def flower_names() -> list[str]:
    """Human names of the 102 flowers, in the order of the official class ids 1 to 102."""
    file = resources.files("speciarl_jax.data.sources") / "flowers102_names.txt"
    return file.read_text(encoding="utf-8").splitlines()


def read_flowers(tree: FileTree) -> Splits:
    """Oxford Flowers 102: ``jpg/image_00001.jpg``, ``imagelabels.mat``, ``setid.mat``."""
    hint = "pass 102flowers.tgz, imagelabels.mat and setid.mat (--archive once for each)"
    labels = _mat(tree.need("imagelabels.mat", hint))["labels"].reshape(-1)
    sets = _mat(tree.need("setid.mat", hint))
    names = flower_names()
    splits: Splits = {}
    for split, field in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        splits[split] = [
            Entry(
                tree.find(f"jpg/image_{number:05d}.jpg"),
                names[int(labels[number - 1]) - 1],
                f"image_{number:05d}.jpg",
            )
            for number in map(int, sets[field].reshape(-1))
        ]
    return splits


def read_food(tree: FileTree) -> Splits:
    """Food-101: ``meta/train.json``, ``meta/test.json``, ``images/CLASS/NUMBER.jpg``."""
    splits: Splits = {}
    for split in ("train", "test"):
        file = tree.need(f"meta/{split}.json", "pass food-101.tar.gz")
        meta = read_json(file, "fetch food-101.tar.gz again")
        splits[split] = [
            Entry(tree.find(f"images/{key}.jpg"), clean_label(key.split("/")[0]), f"{key}.jpg")
            for keys in meta.values()
            for key in keys
        ]
    return splits


def read_pets(tree: FileTree) -> Splits:
    """Oxford-IIIT Pets: ``annotations/trainval.txt``, ``test.txt``, ``images/CLASS_NUMBER.jpg``."""
    splits: Splits = {}
    hint = "pass images.tar.gz and annotations.tar.gz (--archive once for each)"
    for split, file in (("train", "annotations/trainval.txt"), ("test", "annotations/test.txt")):
        stems = [line.split()[0] for line in _lines(tree.need(file, hint)) if line[0] != "#"]
        splits[split] = [
            Entry(tree.find(f"images/{s}.jpg"), clean_label(s.rpartition("_")[0]), f"{s}.jpg")
            for s in stems
        ]
    return splits


def read_aircraft(tree: FileTree) -> Splits:
    """FGVC-Aircraft, variants: ``data/images_variant_SPLIT.txt``, ``data/images/NUMBER.jpg``."""
    splits: Splits = {}
    for split, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        file = tree.need(f"images_variant_{part}.txt", "pass fgvc-aircraft-2013b.tar.gz")
        splits[split] = [
            Entry(tree.find(f"images/{number}.jpg"), clean_label(variant), f"{number}.jpg")
            for number, variant in _table(file).items()
        ]
    return splits


def read_cars(tree: FileTree) -> Splits:
    """Stanford Cars in any of the layouts in circulation.

    The official download is gone; what people have is one of: ``cars_train``, ``cars_test`` with
    the devkit (torchvision's layout, images perhaps one folder deeper, as Kaggle packs them);
    ``car_ims`` with ``cars_annos.mat``; or class folders below ``train`` and ``test``.

    Raises:
        ValueError: none of them.
    """
    if tree.find("cars_train_annos.mat") and tree.find("cars_test_annos_withlabels.mat"):
        return _cars_devkit(tree)
    if (annotations := tree.find("cars_annos.mat")) and tree.all_under("car_ims", IMAGE_SUFFIXES):
        return _cars_joint(tree, annotations)
    splits = {split: _class_folders(tree, split) for split in ("train", "test")}
    if not any(splits.values()):
        raise ValueError(
            "no known layout of Stanford Cars: expected cars_train/ and cars_test/ with "
            "cars_train_annos.mat, cars_meta.mat and cars_test_annos_withlabels.mat; or car_ims/ "
            "with cars_annos.mat; or train/CLASS/ and test/CLASS/ folders"
        )
    return splits


def _cars_devkit(tree: FileTree) -> Splits:
    meta = _mat(tree.need("cars_meta.mat", "it is in car_devkit.tgz"))
    names = [str(name) for name in np.ravel(meta["class_names"])]
    splits: Splits = {}
    for split, file in (
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = np.ravel(_mat(tree.need(file, "see read_cars"))["annotations"])
        folder = f"cars_{split}"
        images = {path.name: path for path in tree.all_under(folder, IMAGE_SUFFIXES)}
        splits[split] = [
            Entry(images.get(str(row.fname)), names[int(row.__dict__["class"]) - 1], str(row.fname))
            for row in rows
        ]
    return splits


def _cars_joint(tree: FileTree, annotations: pathlib.Path) -> Splits:
    content = _mat(annotations)
    names = [str(name) for name in np.ravel(content["class_names"])]
    splits: Splits = {"train": [], "test": []}
    for row in np.ravel(content["annotations"]):
        relative = str(row.relative_im_path)
        entry = Entry(
            tree.find(relative), names[int(row.__dict__["class"]) - 1], relative.rpartition("/")[2]
        )
        splits["test" if int(row.test) else "train"].append(entry)
    return splits


def _class_folders(tree: FileTree, split: str) -> list[Entry]:
    return [
        Entry(path, path.parent.name, f"{path.parent.name}/{path.name}")
        for path in tree.all_under(split, IMAGE_SUFFIXES)
        if path.parent.parent.name == split
    ]


def _mat(path: pathlib.Path) -> dict[str, MatValue]:
    """A MATLAB file with records as objects; `squeeze_me` makes a list of one that one."""
    import scipy.io

    try:
        content: dict[str, MatValue] = scipy.io.loadmat(
            path, struct_as_record=False, squeeze_me=True
        )
    except (OSError, TypeError, NotImplementedError, scipy.io.matlab.MatReadError) as error:
        raise ValueError(f"{path}: damaged MATLAB file ({error}); download it again") from error
    return content
