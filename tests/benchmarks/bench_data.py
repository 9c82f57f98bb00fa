"""Images per second decoded, resized and patched: this package against HF's processor in a loop.

    python tests/benchmarks/bench_data.py [--images 64] [--repeats 5] [--threads 2]

Prints one JSON object. Both sides start from the same JPEG bytes and end with normalised patches;
ours also puts them in window order and pads the batch. No jax backend, no network.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import time

import numpy as np
import PIL
from PIL import Image

from speciarl_jax.arch import VisionArch
from speciarl_jax.data.decode import decode_image
from speciarl_jax.data.images import ImageLimits, VisionArrays, grid_of, num_windows, resize_image

SIZES = [(500, 375), (375, 500), (500, 333), (640, 480), (800, 600), (300, 400)]


def make_jpegs(count: int) -> list[bytes]:
    """Smooth random pictures of the sizes found in CUB, Pets and Food."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def run_hf(files: list[bytes], limits: ImageLimits) -> None:
    """HF's torch-free processor, one image after the other, as a naive pipeline does."""
    from transformers import Qwen2VLImageProcessorPil

    size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    processor = Qwen2VLImageProcessorPil(size=size)
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        processor(images=[image], return_tensors="np")


def run_ours(files: list[bytes], limits: ImageLimits, arch: VisionArch, threads: int) -> None:
    """Decode and resize in threads, then window-ordered patches, eight images to a batch."""
    import concurrent.futures

    def read(data: bytes) -> np.ndarray:
        return resize_image(decode_image(data), arch, limits)

    def fill(batch: list[np.ndarray]) -> None:
        windows = max(num_windows(grid_of(pixels, arch), arch) for pixels in batch)
        arrays = VisionArrays.empty(len(batch), windows, arch)
        for slot, pixels in enumerate(batch):
            arrays.fill_windows(slot, pixels, arch, limits)

    if threads == 1:
        for start in range(0, len(files), 8):
            fill([read(data) for data in files[start : start + 8]])
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pixels = list(pool.map(read, files))
        list(pool.map(fill, [pixels[k : k + 8] for k in range(0, len(pixels), 8)]))


def rate(function, count: int, repeats: int) -> dict[str, float]:
    """Images per second (median, low, high) and CPU time per image, after a warm-up.

    CPU time counts all threads; unlike the rate it hardly moves when the machine is busy.
    """
    function()
    rates = []
    cpu_s = time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        rates.append(count / (time.perf_counter() - start))
    return {
        "median": round(statistics.median(rates), 1),
        "low": round(min(rates), 1),
        "high": round(max(rates), 1),
        "cpu_ms_per_image": round((time.process_time() - cpu_s) * 1e3 / repeats / count, 2),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    files = make_jpegs(args.images)
    limits = ImageLimits(28 * 28 * 4, 448 * 448)
    arch = VisionArch(
        depth=1,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=32,
        full_attention_blocks=(),
    )
    hf = rate(lambda: run_hf(files, limits), len(files), args.repeats)
    one = rate(lambda: run_ours(files, limits, arch, 1), len(files), args.repeats)
    ours = rate(lambda: run_ours(files, limits, arch, args.threads), len(files), args.repeats)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "benchmark": "data_images_per_s",
        "hf_loop": hf,
        "ours_1_thread": one,
        f"ours_{args.threads}_threads": ours,
        "speedup_1_thread": round(one["median"] / hf["median"], 2),
        "speedup": round(ours["median"] / hf["median"], 2),
        "cpu_speedup": round(hf["cpu_ms_per_image"] / ours["cpu_ms_per_image"], 2),
        "load_average": round(os.getloadavg()[0], 1),
        "images": args.images,
        "max_pixels": limits.max_pixels,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "commit": commit,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
