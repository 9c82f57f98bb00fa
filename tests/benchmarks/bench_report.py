"""Measures a page of 20,000 rollouts: ``python tests/report/large.py [--images=20000]``.

Prints one JSON object: size, time to build, and what a headless Chromium needs until the gallery
can be used, to filter it, and to open an answer (median of 5 loads from a file).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from speciarl_jax.report.load import load_run
from speciarl_jax.report.page import ReportOptions, build_page
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.scoring.predictions import Prediction, write_predictions
from speciarl_jax.types import Category


def _photo(rng: np.random.Generator) -> bytes:
    """Detail at several scales, about as hard to compress as a photograph."""
    size = (128, 104)
    picture = np.zeros((size[1], size[0], 3))
    for cells, height in ((4, 90), (12, 45), (48, 18)):
        noise = rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8)
        layer = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), float)
        picture += height * (layer / 127.5 - 1)
    out = io.BytesIO()
    pixels = np.clip(picture + 127, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=92)
    return out.getvalue()


def make(run: Path, images: int, rollouts: int, words: int) -> None:
    """Writes eval/trained with that many rows; texts are drawn from 2,000 words by Zipf's law."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(2000)]
    chances = 1 / np.arange(1, 2001)
    chances /= chances.sum()
    names = [f"{vocabulary[i]} {vocabulary[i + 900]}" for i in range(600)]
    photos = [_photo(rng) for _ in range(min(images, 500))]
    rows = []
    for i in range(images):
        prompt_id = f"big/test/{i:06d}"
        # Same picture, other bytes: each thumbnail is stored by itself.
        image = save_thumbnail(run, prompt_id, photos[i % len(photos)])
        for j in range(rollouts // images):
            text = " ".join(rng.choice(vocabulary, words, p=chances))
            said = str(rng.choice(names))
            rows.append(Prediction(
                prompt_id, f"data_{i % 6}", image, names[i % 600],
                f"<think>{text}</think><answer>{said}</answer>", said,
                Category(int(rng.integers(6))), float(rng.integers(2)), j,
                advantage=float(rng.normal()),
            ))  # fmt: skip
    write_predictions(run / "eval" / "trained" / "predictions.jsonl", rows)


def measure(page: Path) -> dict[str, float]:
    """Median milliseconds of five loads."""
    from tests.support.browser import chromium

    ready, filtered, opened = [], [], []
    with chromium() as driver:
        for _ in range(5):
            driver.get(page.resolve().as_uri())
            while not driver.execute_script("return document.documentElement.dataset.ready"):
                time.sleep(0.01)
            ready.append(float(driver.execute_script(
                "return document.documentElement.dataset.ready")))  # fmt: skip
            times: Any = driver.execute_async_script(_ACTIONS)
            filtered.append(times[0])
            opened.append(times[1])
    return {
        "ready_ms": statistics.median(ready),
        "ready_max_ms": max(ready),
        "filter_ms": statistics.median(filtered),
        "open_ms": statistics.median(opened),
    }


_ACTIONS = """
const done = arguments[0];
document.getElementById('answers').scrollIntoView({behavior: 'instant'});
setTimeout(() => {
  const a = performance.now();
  document.querySelector(".chip[data-code='3']").click();
  const b = performance.now();
  document.querySelector('.card').click();
  const wait = () => document.querySelector('#detail details[open] .text').textContent
    ? done([b - a, performance.now() - b]) : setTimeout(wait, 1);
  wait();
}, 100);
"""


def main() -> int:
    """Builds, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rollouts", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=120)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "run", Path(folder) / "report.html"
        make(run, args.images, args.rollouts, args.words)
        start = time.monotonic()
        page.write_text(build_page([load_run(run)], ReportOptions()), encoding="utf-8")
        result = vars(args) | {
            "build_s": round(time.monotonic() - start, 1),
            "size_mb": round(page.stat().st_size / 1e6, 2),
        }
        print(json.dumps(result | measure(page)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
