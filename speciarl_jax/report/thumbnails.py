"""Small images of a run: written once per image while it runs, packed into the page later."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from speciarl_jax.data.decode import BadImageError, decode_image
from speciarl_jax.files import write_whole

FOLDER = "thumbnails"
SIDE_PX = 128
# (side in px, JPEG quality), best first; the page takes the first that fits its budget.
_SIZES = ((128, 80), (96, 75), (72, 65), (56, 55), (40, 45))


def thumbnail_name(prompt_id: str) -> str:
    """Path of an image's thumbnail, relative to the run directory."""
    name = quote(prompt_id, safe="")
    if len(name) > 200:
        name = name[:150] + "-" + hashlib.sha256(prompt_id.encode()).hexdigest()[:32]
    return f"{FOLDER}/{name}.jpg"


def save_thumbnail(run_dir: str | Path, prompt_id: str, image: bytes) -> str:
    """Writes the thumbnail of an encoded image unless it is there already.

    Returns:
        Path relative to `run_dir`, for `Prediction.image`; "" if the image cannot be decoded.
    """
    name = thumbnail_name(prompt_id)
    path = Path(run_dir) / name
    if path.is_file():
        return name
    jpeg = _shrink(image, SIDE_PX, 88)
    if jpeg is None:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, jpeg)
    return name


def _shrink(data: bytes, side: int, quality: int) -> bytes | None:
    """What the model saw as a JPEG of at most `side` px, or None if it cannot be decoded."""
    try:
        small = decode_image(data, 2 * side)
    except BadImageError:
        return None
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def find_image(run_dir: Path, image: str, prompt_id: str) -> Path | None:
    """File of a row's image inside the run directory, or None.

    A row never leads outside: absolute paths, ``..`` and links that leave the directory are not
    followed.
    """
    root = run_dir.resolve()
    for name in (image, thumbnail_name(prompt_id)):
        if not name or "\0" in name or len(name) > 1000:
            continue
        try:
            path = (root / name).resolve()
            if path.is_relative_to(root) and path.is_file():
                return path
        except (OSError, RuntimeError):  # too long a name, a loop of links
            continue
    return None


def pack(files: Sequence[Path | None], budget_bytes: int) -> tuple[str, list[tuple[int, int]], int]:
    """Concatenated base64 JPEGs, so small that they fit the budget.

    Args:
        files: one per image, None where there is none.
        budget_bytes: limit for the returned text.

    Returns:
        The text; (start, length) of each image in it, (0, 0) for none; the side in px.
    """
    present = [f for f in files if f is not None]
    side, quality = _choose_size(present, budget_bytes)
    spans: list[tuple[int, int]] = []
    parts: list[str] = []
    start = 0
    for file in files:
        jpeg = None if file is None else _shrink(file.read_bytes(), side, quality)
        text = base64.b64encode(jpeg).decode() if jpeg else ""
        if start + len(text) > budget_bytes:
            text = ""
        spans.append((start, len(text)) if text else (0, 0))
        parts.append(text)
        start += len(text)
    return "".join(parts), spans, side


def _choose_size(files: Sequence[Path], budget_bytes: int) -> tuple[int, int]:
    """Largest size whose estimate from an even sample of the images fits the budget."""
    sample = files[:: max(1, len(files) // 40)]
    for side, quality in _SIZES:
        sizes = [len(_shrink(f.read_bytes(), side, quality) or b"") for f in sample]
        if sum(sizes) / max(1, len(sizes)) * len(files) * 4 / 3 * 1.08 <= budget_bytes:
            return side, quality
    return _SIZES[-1]
