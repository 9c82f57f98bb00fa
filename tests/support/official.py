"""Tiny archives in the official layouts of the six benchmarks, with real JPEGs."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

import numpy as np
import scipy.io
from PIL import Image


def jpeg(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A small real photograph, as far as decoders can tell."""
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def mat(**content: object) -> bytes:
    """A MATLAB file."""
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, content)
    return buffer.getvalue()


def tar(path: pathlib.Path, files: dict[str, bytes]) -> str:
    """Writes a tar.gz; returns its path as text."""
    with tarfile.open(path, "w:gz") as pack:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            pack.addfile(info, io.BytesIO(data))
    return str(path)


def cub(folder: pathlib.Path) -> list[str]:
    names = [
        "001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg",
        "001.Black_footed_Albatross/Black_Footed_Albatross_0002_55.jpg",
        "002.Laysan_Albatross/Laysan_Albatross_0001_545.jpg",
        "002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg",
        "029.American_Crow/American_Crow_0001_25053.jpg",
    ]
    files = {f"CUB_200_2011/images/{n}": jpeg(i) for i, n in enumerate(names)}
    listed = "".join(f"{i + 1} {n}\n" for i, n in enumerate(names))
    split = "".join(f"{i + 1} {int(i in (0, 2, 4))}\n" for i in range(len(names)))
    files["CUB_200_2011/images.txt"] = listed.encode()
    files["CUB_200_2011/train_test_split.txt"] = split.encode()
    files["attributes.txt"] = b"1 has_bill_shape::curved\n"
    return [tar(folder / "CUB_200_2011.tgz", files)]


def flowers(folder: pathlib.Path) -> list[str]:
    files = {f"jpg/image_{i:05d}.jpg": jpeg(i) for i in range(1, 9)}
    (folder / "imagelabels.mat").write_bytes(mat(labels=[[77, 77, 1, 1, 46, 46, 102, 60]]))
    sets = {"trnid": [[1, 3]], "valid": [[5, 7]], "tstid": [[2, 4, 6, 8]]}
    (folder / "setid.mat").write_bytes(mat(**sets))
    images = tar(folder / "102flowers.tgz", files)
    return [images, str(folder / "imagelabels.mat"), str(folder / "setid.mat")]


def food(folder: pathlib.Path) -> list[str]:
    meta = {
        "train": {"apple_pie": ["apple_pie/1", "apple_pie/2"], "sushi": ["sushi/10"]},
        "test": {"apple_pie": ["apple_pie/3"], "sushi": ["sushi/11"]},
    }
    files = {
        f"food-101/images/{key}.jpg": jpeg(hash(key) % 1000)
        for classes in meta.values()
        for keys in classes.values()
        for key in keys
    }
    for split, classes in meta.items():
        files[f"food-101/meta/{split}.json"] = json.dumps(classes).encode()
    return [tar(folder / "food-101.tar.gz", files)]


def pets(folder: pathlib.Path) -> list[str]:
    stems = ["Abyssinian_1", "Abyssinian_100", "american_pit_bull_terrier_7", "Maine_Coon_3"]
    images = {f"images/{s}.jpg": jpeg(i) for i, s in enumerate(stems)}
    images["images/Abyssinian_100.mat"] = b"not an image"
    notes = {
        "annotations/list.txt": b"#Image CLASS-ID SPECIES BREED ID\n",
        "annotations/trainval.txt": b"Abyssinian_100 1 1 1\namerican_pit_bull_terrier_7 3 2 2\n",
        "annotations/test.txt": b"Abyssinian_1 1 1 1\nMaine_Coon_3 21 1 8\n",
    }
    return [
        tar(folder / "images.tar.gz", images),
        tar(folder / "annotations.tar.gz", notes),
    ]


_CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]


def _car_rows(classes: list[int]) -> np.ndarray:
    kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    rows = [(1, c, f"{i + 1:05d}.jpg") for i, c in enumerate(classes)]
    return np.array(rows, dtype=kinds)


def cars_devkit(folder: pathlib.Path, extra: str = "") -> list[str]:
    """torchvision's layout; `extra` is the folder that Kaggle's packing repeats."""
    files = {f"cars_train/{extra}{i:05d}.jpg": jpeg(i) for i in (1, 2)}
    files |= {f"cars_test/{extra}{i:05d}.jpg": jpeg(10 + i) for i in (1, 2)}
    names = np.array(_CARS, dtype=object)
    files["devkit/cars_meta.mat"] = mat(class_names=names)
    files["devkit/cars_train_annos.mat"] = mat(annotations=_car_rows([1, 2]))
    files["cars_test_annos_withlabels.mat"] = mat(annotations=_car_rows([2, 1]))
    return [tar(folder / "stanford_cars.tgz", files)]


def cars_joint(folder: pathlib.Path) -> list[str]:
    """The one-archive layout."""
    files = {f"car_ims/{i:06d}.jpg": jpeg(i) for i in (1, 2, 3)}
    kinds = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
    rows = [
        ("car_ims/000001.jpg", 1, 0),
        ("car_ims/000002.jpg", 2, 0),
        ("car_ims/000003.jpg", 2, 1),
    ]
    content = mat(annotations=np.array(rows, dtype=kinds), class_names=np.array(_CARS, object))
    (folder / "cars_annos.mat").write_bytes(content)
    return [tar(folder / "car_ims.tgz", files), str(folder / "cars_annos.mat")]


def cars_folders(folder: pathlib.Path) -> list[str]:
    """A directory that is unpacked already."""
    for split, seed in (("train", 0), ("test", 5)):
        target = folder / "car_data" / split / _CARS[0]
        target.mkdir(parents=True)
        (target / "00001.jpg").write_bytes(jpeg(seed))
    return [str(folder / "car_data")]


def aircraft(folder: pathlib.Path) -> list[str]:
    root = "fgvc-aircraft-2013b/data"
    rows = {
        "train": ["0034309 707-320", "0034958 F/A-18"],
        "val": ["0055307 Boeing_717"],
        "test": ["0062765 DR-400"],
    }
    files = {}
    for split, lines in rows.items():
        files[f"{root}/images_variant_{split}.txt"] = ("\n".join(lines) + "\n").encode()
        for line in lines:
            files[f"{root}/images/{line.split()[0]}.jpg"] = jpeg(int(line[:7]))
    return [tar(folder / "fgvc-aircraft-2013b.tar.gz", files)]
