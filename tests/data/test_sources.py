"""Folders, manifests, Hugging Face directories, CoOp splits, selections, mixtures."""

from __future__ import annotations

import csv
import json
import os
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data import recipe
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.sources import benchmarks
from speciarl_jax.data.sources.catalog import list_sources, open_source
from speciarl_jax.data.sources.folder import folder_taxonomy, open_folder
from speciarl_jax.data.sources.hf_dir import open_hf_dir
from speciarl_jax.data.sources.selection import (
    Mixture,
    Selection,
    divide,
    open_selected,
    parse_mixture,
    select,
)
from tests.support import official


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def photos(tmp_path, noise_image, encode):
    """Two levels of classes, odd names, mixed formats and modes, one broken file."""
    root = tmp_path / "my photos (1)"
    files = {
        "birds/001.Black_Crow/ä ö #1.png": encode(noise_image(60, 40, mode="RGBA")),
        "birds/001.Black_Crow/two.JPG": encode(noise_image(64, 48), "JPEG"),
        "birds/001.Black_Crow/three.webp": encode(noise_image(33, 200), "WEBP"),
        "birds/Red finch/a.gif": encode(noise_image(50, 50).convert("P"), "GIF"),
        "birds/Red finch/b.tiff": encode(noise_image(80, 30, mode="CMYK"), "TIFF"),
        "dogs/Pug/a.png": encode(noise_image(45, 60, mode="L")),
        "dogs/Pug/b.png": encode(noise_image(46, 60, mode="LA")),
        "dogs/Pug/broken.jpg": b"oops",
        "dogs/Pug/notes.txt": b"no image",
        "dogs/Pug/.hidden.png": b"no image",
        ".cache/x/y.png": b"no image",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _all(source):
    return [source[i] for i in range(len(source))]


def test_folder_divides_every_class(photos):
    parts = {split: _all(open_folder(photos, split)) for split in ("train", "test")}
    assert len(parts["train"]) + len(parts["test"]) == 8
    for split in parts:
        labels = {e.ground_truth for e in parts[split]}
        assert labels == {"Black Crow", "Red finch", "Pug"}
    ids = [e.prompt_id for e in parts["train"] + parts["test"]]
    assert len(set(ids)) == 8
    assert all(i.startswith("my_photos_1") for i in ids)
    again = [e.prompt_id for s in parts for e in _all(open_folder(photos, s))]
    assert again == ids


def test_folder_with_splits(tmp_path, encode, noise_image):
    data = encode(noise_image(30, 30))
    for name in ("train/Crow/a.png", "val/Crow/b.png", "test/Owl/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert [e.ground_truth for e in _all(open_folder(tmp_path, "test"))] == ["Owl"]
    assert len(open_folder(tmp_path, "validation")) == 1
    with pytest.raises(ValueError, match=r"'nope'; it has test, train, validation"):
        open_folder(tmp_path, "nope")


def test_folder_taxonomy_is_what_the_offline_judge_reads(photos, tmp_path):
    from speciarl_jax.judge.offline.taxonomy import TaxonomyJudge
    from speciarl_jax.types import Category

    tree = folder_taxonomy(photos)
    assert [node["name"] for node in tree] == ["birds", "dogs"]
    assert [node["name"] for node in tree[0]["children"]] == ["Black Crow", "Red finch"]
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    judge = TaxonomyJudge.from_path(tmp_path / "tree.json")
    assert judge.category("Black Crow", "bird") is Category.LESS_SPECIFIC
    assert judge.category("Black Crow", "Red finch") is Category.WRONG


def test_folder_of_photographs_loads(photos, builder, open_loader):
    source = open_folder(photos, "train")
    loader = open_loader(source, builder, 2, num_epochs=1, bad_image_budget_frac=0.5)
    assert sum(int(b.is_real.sum()) for b in loader) >= 4
    bad = [*loader.index.bad]
    test_loader = open_loader(open_folder(photos, "test"), builder, 1, bad_image_budget_frac=0.5)
    bad += test_loader.index.bad
    assert [s.image_name for s in bad] == ["dogs/Pug/broken.jpg"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests(kind, photos):
    rows = [
        {"image": "birds/Red finch/a.gif", "label": "red_finch", "split": "train"},
        {"image": "dogs/Pug/a.png", "label": "pug", "split": "test"},
    ]
    file = photos / f"list.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["image", "label", "split"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (example,) = _all(open_source(f"folder:{file}", "train"))
    assert example.ground_truth == "red finch"
    assert example.dataset == "list"
    assert example.image == (photos / "birds/Red finch/a.gif").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "foo,label\nx,y\n", "no column for the image path"),
        ("a.csv", "image,label\na,x\nb,x\na,y\n", "rows 1 and 3: both name 'a'"),
        ("a.csv", "image,foo\nx,y\n", "no column for the label"),
        ("a.csv", "image,label\nx,\n", "row 1: empty"),
        ("a.csv", "image,label,split\nx,y,later\n", "split 'later' is unknown"),
        ("a.csv", "", "no rows"),
        ("a.jsonl", "{\n", "cannot be read"),
        ("a.jsonl", "[1]\n", "cannot be read"),
        ("a.parquet", "hello", "cannot be read"),
        ("a.txt", "hello", "expected one of .csv"),
    ],
)
def test_bad_manifests(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / name, "train")


def test_missing_files_of_a_manifest_are_bad_images(
    tmp_path, builder, encode, noise_image, open_loader
):
    (tmp_path / "a.png").write_bytes(encode(noise_image(30, 30)))
    (tmp_path / "m.csv").write_text("image,label,split\na.png,x,train\ngone.png,y,train\n")
    source = open_folder(tmp_path / "m.csv", "train")
    loader = open_loader(source, builder, 1, bad_image_budget_frac=0.5)
    assert [s.image_name for s in loader.index.bad] == ["gone.png"]
    assert "missing" in loader.index.bad[0].reason


def test_no_folder_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        open_folder(tmp_path / "x", "train")
    with pytest.raises(ValueError, match="no images; expected CLASS/IMAGE"):
        open_folder(tmp_path, "train")


def _hf_table(images, labels):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    return pyarrow.table({"image": pyarrow.array(rows, kind), "label": pyarrow.array(labels)})


FEATURES = {"label": {"names": ["crow_1", "owl"], "_type": "ClassLabel"}}


@pytest.mark.parametrize("layout", ["saved", "saved dict", "parquet"])
def test_hf_directories(layout, tmp_path, encode, noise_image, data_dir):
    images = [encode(noise_image(30, 30 + i)) for i in range(4)]
    table = _hf_table(images, [0, 1, 1, 0])
    root = tmp_path / "set"
    if layout == "parquet":
        (root / "data").mkdir(parents=True)
        meta = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
        table = table.replace_schema_metadata(meta)
        for k in range(2):
            file = root / "data" / f"train-0000{k}-of-00002.parquet"
            pyarrow.parquet.write_table(table.slice(2 * k, 2), file)
    else:
        folder = root / "train" if layout == "saved dict" else root
        folder.mkdir(parents=True)
        files = []
        for k in range(2):
            name = f"data-0000{k}-of-00002.arrow"
            with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
                writer.write_table(table.slice(2 * k, 2))
            files.append({"filename": name})
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
        (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    source = open_hf_dir(root, "train", data_dir)
    for opened in (source, pickle.loads(pickle.dumps(source))):
        examples = _all(opened)
        assert [e.image for e in examples] == images
        assert [e.ground_truth for e in examples] == ["crow 1", "owl", "owl", "crow 1"]
        assert opened.labels() == [e.ground_truth for e in examples]
        assert len({e.prompt_id for e in examples}) == 4
    with pytest.raises(ValueError, match="split 'test' does not exist; it has train"):
        open_hf_dir(root, "test", data_dir)


def test_bad_hf_directories(tmp_path, data_dir):
    with pytest.raises(ValueError, match="no Hugging Face dataset"):
        open_hf_dir(tmp_path, "train", data_dir)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column of images"):
        open_hf_dir(tmp_path, "train", data_dir)
    (tmp_path / "train.parquet").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"train.parquet|damaged"):
        open_hf_dir(tmp_path, "train", data_dir)


def test_coop_split(tmp_path):
    benchmarks.build("flowers", tmp_path / "d", official.flowers(tmp_path), allow_partial=True)
    split = {
        "train": [["image_00002.jpg", 76, "passion flower"], ["image_00001.jpg", 76, "x"]],
        "val": [],
        "test": [["image_00008.jpg", 59, "dahlia"]],
    }
    file = tmp_path / "split_zhou_OxfordFlowers.json"
    file.write_text(json.dumps(split))
    train = _all(open_source(f"flowers:coop={file}", "train", tmp_path / "d"))
    assert [e.prompt_id for e in train] == [
        "flowers/coop-train/image_00002.jpg",
        "flowers/coop-train/image_00001.jpg",
    ]
    assert [e.split for e in train] == ["train", "train"]
    (test,) = _all(open_source(f"flowers:coop={file}", "test", tmp_path / "d"))
    assert test.ground_truth == "pink-yellow dahlia"
    file.write_text(json.dumps(split | {"test": [["nope.jpg", 0, ""]]}))
    with pytest.raises(ValueError, match=r"1 of 1 images are not in the built flowers"):
        open_source(f"flowers:coop={file}", "test", tmp_path / "d")
    with pytest.raises(ValueError, match="not found"):
        open_source("flowers:coop=/nowhere.json", "test", tmp_path / "d")
    with pytest.raises(ValueError, match="flowers:coop=FILE"):
        open_source("flowers:zhou", "test", tmp_path / "d")


def test_field_guide_sources(data_dir):
    source = open_source("field_guide_dogs:test=6", "test", data_dir)
    examples = _all(source)
    assert len(examples) == 6
    assert all(e.image[:4] == b"\x89PNG" for e in examples)
    assert [e.prompt_id for e in examples] == [
        f"field_guide_dogs/test/test-{i:05d}" for i in range(6)
    ]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == examples[3]
    with pytest.raises(ValueError, match="split 'train' does not exist; it has test"):
        open_source("field_guide_dogs:test=6", "train", data_dir)
    with pytest.raises(ValueError, match="option 'tset'"):
        open_source("field_guide_dogs:tset=6", "test", data_dir)
    with pytest.raises(ValueError, match="not KEY=NUMBER"):
        open_source("field_guide_dogs:test=six", "test", data_dir)
    with pytest.raises(ValueError, match="unknown: expected one of field_guide_birds"):
        open_source("field_guide_cats", "test", data_dir)


def test_damaged_records_are_named(tmp_path):
    spec = "field_guide_dogs:test=3"
    open_source(spec, "test", tmp_path)
    (index,) = tmp_path.rglob("speciarl_index.json")
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"damaged.*build it again"):
        open_source(spec, "test", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damaged_array_records_are_named(damage, tmp_path):
    spec = "field_guide_dogs:validation=0,test=3"
    open_source(spec, "test", tmp_path)
    (file,) = tmp_path.rglob("*array_record*")
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        flipped = raw[:200] + bytes([raw[200] ^ 255]) + raw[201:]
        file.write_bytes(raw[:1000] if damage == "truncated" else flipped)
    with pytest.raises(ValueError, match="build it again"):
        _all(open_source(spec, "test", tmp_path))


def test_list_sources(data_dir):
    infos = {info.name: info for info in list_sources(data_dir)}
    assert not infos["cub"].is_built
    assert infos["aircraft"].splits == ("train", "validation", "test")
    assert "field_guide_birds" in infos


def test_subsets_are_nested_seeded_and_in_order(make_examples):
    source = make_examples(40)
    small = [e.prompt_id for e in _all(select(source, Selection(count=8)))]
    large = [e.prompt_id for e in _all(select(source, Selection(count=20)))]
    other = [e.prompt_id for e in _all(select(source, Selection(count=8, seed=1)))]
    assert set(small) < set(large)
    assert small != other
    assert small == sorted(small, key=lambda i: int(i.rpartition("/")[2]))
    assert select(source, Selection()) is source


def test_selection_by_class(make_examples):
    source = make_examples(10)
    chosen = select(source, Selection(include_classes=("thing 3", "THING  5")))
    assert [e.ground_truth for e in _all(chosen)] == ["thing 3", "thing 5"]
    rest = select(source, Selection(exclude_classes=("thing 0",)))
    assert len(rest) == 9
    assert chosen.labels() == ["thing 3", "thing 5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 11}, "only 10 are available"),
        ({"include_classes": ("thing 1",), "exclude_classes": ("thing 1",)}, "leaves no examples"),
    ],
)
def test_impossible_selections(options, message, make_examples):
    with pytest.raises(ValueError, match=message):
        select(make_examples(10), Selection(**options))


def test_selection_ranges():
    with pytest.raises(ValueError, match="expected count"):
        Selection(count=-1)


def test_mixture_specs():
    assert parse_mixture("cub") == [(1.0, "cub")]
    assert parse_mixture("2*cub + flowers + .5 * folder:/a b+c") == [
        (2.0, "cub"),
        (1.0, "flowers"),
        (0.5, "folder:/a b+c"),
    ]
    with pytest.raises(ValueError, match="WEIGHT"):
        parse_mixture("cub + ")


def test_divide_by_weight():
    assert divide([1] * 6, [3000, 900, 5000, 600, 800, 700], count=3000) == [500] * 6
    assert divide([2, 1], [100, 100]) == [100, 50]
    assert divide([1, 1, 1], [10, 10, 10], count=10) == [4, 3, 3]
    with pytest.raises(ValueError, match="source number 2 would give 5 and has 3"):
        divide([1, 1], [10, 3], count=10)


def test_mixture_of_sources(data_dir):
    spec = "3*field_guide_dogs:test=6 + field_guide_flowers:test=6"
    source = open_selected(spec, "test", data_dir, Selection(count=8))
    names = [e.dataset for e in _all(source)]
    assert names == ["field_guide_dogs"] * 6 + ["field_guide_flowers"] * 2
    assert len(source.labels()) == 8
    assert isinstance(source, Mixture)
    whole = open_selected(spec, "test", data_dir, Selection())
    assert len(whole) == 8
    assert whole.fingerprint() == source.fingerprint()
    with pytest.raises(ValueError, match="class 'unicorn' does not occur"):
        open_selected(spec, "test", data_dir, Selection(include_classes=("unicorn",)))


def test_recipe_to_loader(data_dir, tokenizer, arch, tmp_path):
    limits = {"min_pixels": 784, "max_pixels": 50_176, "patch_size": 14}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    data = DataConfig(
        source="field_guide_dogs:test=12",
        split="test",
        eval_sources=("field_guide_dogs:test=12",),
        num_train=8,
        num_eval=5,
        data_dir=str(data_dir),
        max_pixels=112 * 112,
    )
    builder = recipe.make_builder(data, tokenizer, arch, tmp_path)
    assert builder.limits.max_pixels == 112 * 112
    train = recipe.open_train_source(data)
    loader = PromptLoader(data, train, builder, 4, seed=1, num_epochs=1)
    ids = [i for batch in loader for i in batch.prompt_ids]
    assert len(ids) == 8
    evaluation = recipe.open_eval_source(data, data.eval_sources[0], "test", 5)
    batches = list(PromptLoader(data, evaluation, builder, 4, shuffle=False, num_epochs=1))
    assert sum(int(b.is_real.sum()) for b in batches) == 5
    assert np.isfinite(batches[0].vision.patches).all()
    assert list((data_dir / "index").iterdir())


def test_what_a_folder_leaves_out_is_named_and_counted(tmp_path, encode, noise_image, caplog):
    root, data = tmp_path / "photos", encode(noise_image(30, 30))
    (root / "Crow").mkdir(parents=True)
    for name in ("Crow/a.png", "Crow/b.png", "beside.png", "Crow/c.HEIC", "Crow/d.avif", "x.txt"):
        (root / name).write_bytes(data)
    os.mkfifo(root / "Crow" / "pipe.png")
    (root / "Crow" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "Crow" / "loop.jpg").symlink_to(root / "Crow" / "loop.jpg")
    bad_name = os.fsencode(root / "Crow") + b"/caf\xe9.png"
    with open(bad_name, "wb") as file:
        file.write(data)
    sources = [open_folder(root, split) for split in ("train", "test")]
    names = {e.image_name for source in sources for e in _all(source)}
    assert names == {"Crow/a.png", "Crow/b.png"}
    assert all(json.dumps(list(names)).isascii() for _ in names)
    told = sorted(
        record.getMessage().removeprefix(f"folder source {root}: ") for record in caplog.records
    )
    assert told == [
        "1 .avif pictures cannot be decoded here; convert them to .jpg or .png: 'Crow/d.avif'",
        "1 .heic pictures cannot be decoded here; convert them to .jpg or .png: 'Crow/c.HEIC'",
        "1 files are no pictures: 'x.txt'",
        "1 files have names that are not UTF-8; rename them: 'Crow/caf\\udce9.png'",
        "1 pictures lie beside the class folders, without a label: 'beside.png'",
        "3 names are no files (pipes, devices, broken links): 'Crow/gone.jpg', 'Crow/loop.jpg', "
        "'Crow/pipe.png'",
    ]


def test_linked_class_folders_are_followed_and_loops_are_not(tmp_path, encode, noise_image, caplog):
    root, store, data = tmp_path / "photos", tmp_path / "store", encode(noise_image(30, 30))
    for folder in (root / "Crow", store / "Owl", store / "Owl" / "Barn owl"):
        folder.mkdir(parents=True)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(data)
    (root / "Owl").symlink_to(store / "Owl")
    (root / "Crow" / "up").symlink_to(root)
    (store / "Owl" / "itself").symlink_to(store / "Owl")
    (root / "Crow" / "out").symlink_to(tmp_path)
    (root / "Crow" / "other").symlink_to(root / "Owl")  # its name is a class, links as they are
    labels = [file.labels for split in ("train", "test") for file in open_folder(root, split).files]
    assert sorted(set(labels)) == [
        *[("Crow",), ("Crow", "other"), ("Crow", "other", "Barn owl")],
        *[("Owl",), ("Owl", "Barn owl")],
    ]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "4 links lead back to a folder above and are not followed" in told


def test_a_manifest_that_names_a_pipe_is_no_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "m.csv").write_text("image,label,split\npipe.png,crow,train\n")
    (example,) = _all(open_folder(tmp_path / "m.csv", "train"))
    assert example.image == b""
