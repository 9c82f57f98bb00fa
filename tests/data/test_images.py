"""Images: parity with HF's torch-free processor, window order, hostile files."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speciarl_jax.data.decode import BadImageError, decode_image
from speciarl_jax.data.images import (
    ImageLimits,
    VisionArrays,
    num_windows,
    resize_image,
    smart_resize,
    window_layout,
)
from speciarl_jax.monitor.writer import _pixels
from speciarl_jax.report import thumbnails
from tests.support.hf_order import hf_order

SIZES = [
    (28, 28), (29, 27), (56, 560), (560, 56), (84, 168), (100, 37), (112, 112), (113, 225),
    (224, 224), (333, 500), (500, 333), (640, 480), (1, 1), (1, 150), (30, 5000), (1280, 960),
]  # fmt: skip


def _hf_processor(limits: ImageLimits):
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    )


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("limits", [ImageLimits(), ImageLimits(28 * 28, 200 * 200)])
def test_patches_equal_hf(width, height, limits, arch, noise_image):
    image = noise_image(width, height)
    expected = _hf_processor(limits)(images=[image], return_tensors="np")
    patches, grid = hf_order(image, arch.vision, limits)
    assert grid == tuple(expected["image_grid_thw"][0])
    np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "CMYK"])
def test_colour_modes_equal_hf(mode, arch, limits, noise_image, encode):
    image = noise_image(90, 70, mode=mode)
    kind = {"CMYK": "TIFF"}.get(mode, "PNG")
    expected = _hf_processor(limits)(images=[image], return_tensors="np")
    patches, _ = hf_order(decode_image(encode(image, kind)), arch.vision, limits)
    np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=1e-6)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([14, 28, 56]),
    low=st.integers(1, 200_000),
    span=st.integers(0, 1_000_000),
)
@settings(deadline=None, max_examples=200)
def test_smart_resize_equals_hf(height, width, factor, low, span):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf

    try:
        expected = hf(height, width, factor, low, low + span)
    except ValueError:
        with pytest.raises(BadImageError, match="times the other"):
            smart_resize(height, width, factor, low, low + span)
        return
    assert smart_resize(height, width, factor, low, low + span) == expected


@pytest.mark.parametrize(
    "grid", [(1, 2, 2), (1, 8, 8), (1, 6, 10), (1, 16, 24), (1, 4, 40), (1, 18, 10)]
)
@pytest.mark.parametrize("window_px", [28, 56, 112])
def test_window_layout_equals_hf_less_padding(grid, window_px, arch):
    import dataclasses

    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    vision = dataclasses.replace(arch.vision, window_size_px=window_px)
    layout = window_layout(grid, vision)
    hf_grid = torch.tensor([grid])
    window_index, cu_seqlens = get_vision_window_index(hf_grid, 2, window_px, 14)
    merged = layout.source.reshape(-1, 4)[:, 0]
    is_real = merged >= 0
    np.testing.assert_array_equal(merged[is_real] // 4, window_index.numpy())
    per_window = (layout.source >= 0).reshape(-1, vision.window_patches).sum(1)
    np.testing.assert_array_equal(np.cumsum(per_window), cu_seqlens.numpy()[1:])
    positions = get_vision_position_ids(hf_grid, 2).numpy()
    real_patches = layout.source >= 0
    np.testing.assert_array_equal(
        layout.positions[real_patches], positions[layout.source[real_patches]]
    )
    assert not layout.positions[~real_patches].any()
    # merged_rows undoes the window order: raster token k sits at row merged_rows[k].
    np.testing.assert_array_equal(merged[layout.merged_rows] // 4, np.arange(len(window_index)))
    assert len(layout.source) == num_windows(grid, vision) * vision.window_patches


def test_window_layout_by_hand(arch):
    """A row of 5 merged tokens, windows of 4 x 4: two windows; the second holds one token."""
    layout = window_layout((1, 2, 10), arch.vision)
    assert len(layout.source) == 2 * arch.vision.window_patches
    assert layout.merged_rows.tolist() == [0, 1, 2, 3, 16]
    assert layout.source[:16].tolist() == list(range(16))
    assert layout.source[64:68].tolist() == [16, 17, 18, 19]
    assert layout.positions[64:68].tolist() == [[0, 8], [0, 9], [1, 8], [1, 9]]
    assert (layout.source >= 0).sum() == 20


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 0, 4)])
def test_window_layout_refuses(grid, arch):
    with pytest.raises(ValueError, match="expected"):
        window_layout(grid, arch.vision)


def test_fill_windows_is_the_hf_array_in_window_order(arch, limits, noise_image):
    image = noise_image(150, 90)
    reference = _hf_processor(limits)(images=[image], return_tensors="np")["pixel_values"]
    arrays = VisionArrays.empty(2, 4, arch.vision)
    layout = arrays.fill_windows(1, resize_image(image, arch.vision, limits), arch.vision, limits)
    used = len(layout.source)
    is_real = layout.source >= 0
    got = arrays.patches[1, :used][is_real]
    np.testing.assert_allclose(got, reference[layout.source[is_real]], rtol=0, atol=1e-6)
    assert not arrays.patches[1, :used][~is_real].any()
    assert not arrays.patches[1, used:].any()
    assert not arrays.mask[0].any()
    assert arrays.mask[1].sum() == len(reference)


def test_exif_orientation_is_applied(encode):
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(image, "JPEG", exif=exif)).size == (20, 40)


def test_transparent_becomes_white(encode):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode_image(encode(image)).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_transparency_becomes_white(encode):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert decode_image(encode(image, "GIF", transparency=0)).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bit_is_scaled_not_clipped(encode):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values))))
    np.testing.assert_allclose(decoded[..., 0], values / 257.0, atol=0.51)


def test_float_tiff_is_scaled(encode):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
    np.testing.assert_allclose(decoded[..., 0], values * 255, atol=0.51)


def test_animation_gives_its_first_frame(encode):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly anything."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\xff\xd8\xff\xe0" + b"\0" * 40,
        _png_header(0, 10),
        _png_header(10, 0),
        _png_header(60_000, 60_000),
        _png_header(9_000, 9_000),
        _png_header(100, 100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"II*\0\x08\0\0\0" + b"\xff" * 30,
    ],
)
def test_hostile_bytes_are_bad_images(data):
    with pytest.raises(BadImageError):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_bad_images(kind, noise_image, encode):
    data = encode(noise_image(64, 64), kind)
    with pytest.raises(BadImageError):
        decode_image(data[: len(data) // 2])


@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "TGA"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
    keep=st.floats(0.05, 1.0),
)
@settings(deadline=None, max_examples=300)
def test_mutated_files_decode_or_are_bad(kind, edits, keep, noise_image, encode):
    data = bytearray(encode(noise_image(24, 24), kind))
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    data = data[: max(1, int(len(data) * keep))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage, and mends it
        try:
            image = decode_image(bytes(data))
        except BadImageError:
            return
    assert image.mode == "RGB"


def test_limits_from_both_config_styles(tmp_path, arch):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}))
    flat = ImageLimits.from_dir(tmp_path, arch.vision)
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    file.write_text(json.dumps({"size": size, "image_mean": [0.5, 0.5, 0.5]}))
    nested = ImageLimits.from_dir(tmp_path, arch.vision)
    assert (flat.min_pixels, flat.max_pixels) == (nested.min_pixels, nested.max_pixels)
    assert flat.max_pixels == 12845056
    assert nested.mean == (0.5, 0.5, 0.5)
    assert flat.override(max_pixels=100_000).max_pixels == 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"patch_size": 16}', "patch_size=16"),
        ('{"resample": 2}', "resample=2"),
        ('{"rescale_factor": 0.5}', "rescale_factor"),
        ('{"rescale_factor": null}', "rescale_factor=None"),
        ('{"min_pixels": 100, "max_pixels": 50}', "min_pixels=100"),
    ],
)
def test_limits_refuse(content, message, tmp_path, arch):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ImageLimits.from_dir(tmp_path, arch.vision)


def test_limits_need_a_file(tmp_path, arch):
    with pytest.raises(ValueError, match="not found"):
        ImageLimits.from_dir(tmp_path, arch.vision)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
showpage
"""


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        b"\xd7\xcd\xc6\x9a" + bytes(60),  # WMF
        b"BLP1" + bytes(200),
        b"SIMPLE  =                    T" + b" " * 50 + b"END" + b" " * 2800,  # FITS
        b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"\n};',
    ],
)
def test_no_reader_but_those_of_pictures_is_tried(data, tmp_path, monkeypatch):
    """Ghostscript is started by whoever opens an EPS, whatever its name: here it would be seen."""
    marker = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked up anew
    with pytest.raises(BadImageError, match="cannot identify"):
        decode_image(data)
    assert thumbnails.save_thumbnail(tmp_path, "x", data) == ""
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["exif", "sixteen bit", "alpha", "palette"])
def test_thumbnails_and_boards_show_what_the_model_saw(kind, tmp_path, encode):
    data = _odd_picture(kind, encode)
    seen = np.asarray(decode_image(data), np.float64)
    name = thumbnails.save_thumbnail(tmp_path, "x", data)
    with Image.open(tmp_path / name) as image:
        shown = np.asarray(image, np.float64)
    for picture in (shown, np.asarray(_pixels(data), np.float64)):
        assert picture.shape == seen.shape
        assert np.abs(picture - seen).mean() < 6  # of JPEG


def _odd_picture(kind, encode):
    ramp = np.linspace(0, 1, 60)[None] * np.ones((40, 1))
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # upright after a quarter turn
        return encode(Image.fromarray((ramp * 255).astype(np.uint8)), "JPEG", exif=exif)
    if kind == "sixteen bit":
        return encode(Image.fromarray((ramp * 65535).astype(np.uint16)))
    alpha = Image.fromarray(np.stack([ramp * 0, ramp * 0, ramp * 0, ramp * 255], -1).astype("u1"))
    return encode(alpha if kind == "alpha" else alpha.quantize(16))
