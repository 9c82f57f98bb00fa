"""Templates, chat format, expansion and batches, against HF's processor where it has an opinion."""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from speciarl_jax.data.collate import WINDOW_BUCKETS, collate, prompt_bucket, window_bucket
from speciarl_jax.data.images import ImageLimits
from speciarl_jax.data.prompts import PromptBuilder, PromptTemplate
from speciarl_jax.types import Example
from tests.support.hf_order import hf_order


@pytest.fixture(scope="module")
def hf_processor(tokenizer, limits):
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    )
    # HF's video processor needs torchvision; without videos it is not asked for anything.
    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    processor.check_argument_for_proper_class = lambda name, value: type(value)
    processor.__init__(image_processor, tokenizer, None, chat_template=tokenizer.chat_template)
    return processor


@pytest.mark.parametrize("sizes", [[(90, 60)], [(28, 28), (300, 40)], [(56, 56)] * 3, []])
def test_tokens_and_patches_equal_hf(
    sizes, hf_processor, builder, arch, limits, noise_image, encode
):
    images = [noise_image(*size, seed=i) for i, size in enumerate(sizes)]
    encoded = builder.encode_images([encode(image) for image in images])
    text = builder.render("What is this?", len(images))
    expected = hf_processor(text=[text], images=images or None, return_tensors="np")
    np.testing.assert_array_equal(encoded.tokens, expected["input_ids"][0])
    if images:
        ours = [hf_order(image, arch.vision, limits)[0] for image in images]
        np.testing.assert_allclose(np.concatenate(ours), expected["pixel_values"], atol=1e-6)


def test_rendered_chat(builder):
    assert builder.render("Hi.") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["plain", "specific"])
def test_shipped_prompts(name):
    template = PromptTemplate.load(name)
    assert len(template.texts) == 1
    for word in ("<think>", "<answer>", "None"):
        assert word in template.texts[0]


def test_prompt_is_found_beside_the_recipe_and_by_path(tmp_path):
    (tmp_path / "prompts").mkdir()
    file = tmp_path / "prompts" / "mine.txt"
    file.write_text("First?\n---\nSecond?\n")
    by_name = PromptTemplate.load("mine", recipe_dir=tmp_path)
    assert by_name.texts == ("First?", "Second?")
    assert PromptTemplate.load(str(file)).texts == by_name.texts
    assert len(PromptTemplate.load(f"{file}, plain").texts) == 3


@pytest.mark.parametrize(
    ("content", "message"), [("", "empty"), ("a\n---\n\n", "empty"), ("<|im_end|>", "special")]
)
def test_bad_prompt_files(content, message, tmp_path):
    file = tmp_path / "bad.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        PromptTemplate.load(str(file))


@pytest.mark.slow
def test_an_installed_package_brings_its_prompts(tmp_path):
    """What setup.py copies into a wheel, used without the repository."""
    root = pathlib.Path(__file__).parents[2]
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(root / name, source)
    for name in ("speciarl_jax", "configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={built}"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    names = sorted(path.stem for path in (root / "configs" / "prompts").glob("*.txt"))
    code = (
        "import speciarl_jax; from speciarl_jax.data.prompts import PromptTemplate; "
        f"print(speciarl_jax.__file__, len([PromptTemplate.load(n) for n in {names}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(built)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str(built / "speciarl_jax" / "__init__.py"), str(len(names))]


def test_missing_prompt_lists_the_places():
    with pytest.raises(ValueError, match=r"nowhere.*configs/prompts/nowhere.txt"):
        PromptTemplate.load("nowhere")


def test_pool_draw_is_seeded_and_varied():
    template = PromptTemplate("pool", ("a", "b", "c"))
    picks = [template.pick(0, f"id{i}") for i in range(60)]
    assert picks == [template.pick(0, f"id{i}") for i in range(60)]
    assert set(picks) == {"a", "b", "c"}
    assert picks != [template.pick(1, f"id{i}") for i in range(60)]
    assert picks != [template.pick(0, f"id{i}", epoch=1) for i in range(60)]


def test_builder_refuses_wrong_tokenizers(tokenizer, arch, limits, template):
    import copy
    import dataclasses

    with pytest.raises(ValueError, match="do not belong together"):
        PromptBuilder(tokenizer, dataclasses.replace(arch, image_token_id=3), limits, template)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat_template"):
        PromptBuilder(bare, arch, limits, template)
    bare.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ValueError, match="0 image placeholders"):
        PromptBuilder(bare, arch, limits, template)


def test_collate_maps_every_image_token(builder, arch, limits, noise_image, encode):
    """Filling merged embeddings with their own patch coordinates must give raster order."""
    prompts = [
        builder.encode_images([encode(noise_image(200, 90, seed=1))], name="a"),
        builder.encode_images(
            [encode(noise_image(60, 60)), encode(noise_image(140, 28, seed=2))], name="b"
        ),
    ]
    batch = collate(prompts, arch, limits, pad_id=1, num_prompts=3)
    assert batch.is_real.tolist() == [True, True, False]
    assert batch.tokens.shape[1] % 32 == 0
    assert batch.vision.patches.shape[0] == 3 * 2
    assert not batch.vision.mask[[1, 4, 5]].any()
    flat_positions = batch.vision.positions[:, ::4].reshape(-1, 2)
    flat_mask = batch.vision.mask[:, ::4].reshape(-1)
    for row, prompt in enumerate(prompts):
        is_image = prompt.tokens == arch.image_token_id
        rows = batch.table_rows(len(flat_mask))[row, : len(prompt.tokens)]
        assert (rows[~is_image] == -1).all()
        assert flat_mask[rows[is_image]].all()
        expected = [
            (2 * r, 2 * c)
            for pixels in prompt.pixels
            for r in range(pixels.shape[0] // 28)
            for c in range(pixels.shape[1] // 28)
        ]
        np.testing.assert_array_equal(flat_positions[rows[is_image]], expected)
        own = batch.image_rows[row, : len(prompt.tokens)][is_image]
        assert own.min(initial=0) >= 0
        assert own.max(initial=0) < len(flat_mask) // 3
    assert (batch.image_rows[2] == -1).all()
    assert batch.prompt_lengths.tolist()[2] == 1
    assert (batch.tokens[2] == 1).all()
    assert batch.global_index.tolist() == [0, 1, 2]
    assert batch.prompt_ids == ["a", "b", ""]


def test_collate_refuses(builder, arch, limits, noise_image, encode):
    prompt = builder.encode_images([encode(noise_image(60, 60))] * 2)
    with pytest.raises(ValueError, match="do not fit"):
        collate([prompt, prompt], arch, limits, 0, num_prompts=1)
    with pytest.raises(ValueError, match="images_per_prompt=1"):
        collate([prompt], arch, limits, 0, images_per_prompt=1)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens"):
        collate([prompt], arch, limits, 0, prompt_buckets=(8, 16))
    with pytest.raises(ValueError, match="at least one row"):
        collate([], arch, limits, 0)


def test_buckets_waste_at_most_a_third():
    assert [prompt_bucket(n) for n in (1, 32, 33, 100)] == [32, 32, 64, 128]
    assert prompt_bucket(40, (48, 100)) == 48
    assert window_bucket(5) == 6
    for small, large in itertools.pairwise(WINDOW_BUCKETS[2:]):
        assert large / small <= 1.51
    assert window_bucket(1000) >= 1000


def test_pool_pads_for_its_longest_text(tokenizer, arch, limits, noise_image, encode):
    pool = PromptTemplate("pool", ("short", "a much longer question than the other one is"))
    builder = PromptBuilder(tokenizer, arch, limits, pool)
    data = encode(noise_image(56, 56))
    example = Example(data, "x", "d", "train", "d/train/0")
    sizes = {builder.encode(example, epoch=e).longest_tokens for e in range(8)}
    lengths = {len(builder.encode(example, epoch=e).tokens) for e in range(8)}
    assert len(sizes) == 1
    assert len(lengths) == 2
    assert sizes == {builder.size_of(builder.read_pixels(data))[0]}


def test_limits_change_the_number_of_tokens(tokenizer, arch, template, noise_image, encode):
    data = encode(noise_image(224, 224))
    counts = []
    for limit in (224 * 224, 112 * 112):
        builder = PromptBuilder(tokenizer, arch, ImageLimits(28 * 28, limit), template)
        tokens = builder.encode_images([data]).tokens
        counts.append(int((tokens == arch.image_token_id).sum()))
    assert counts == [64, 16]
