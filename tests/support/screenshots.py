"""Takes the screenshots of a report.

Call: ``python tests/report/screenshots.py RUN_DIR [...] --out docs/images``

Writes report_desktop.png and report_phone.png (top of the page), report_dark.png, and
report_gallery.png and report_answer.png (the gallery, and one image opened).
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from speciarl_jax.cli import report
from tests.support.browser import chromium, is_available


def _wait_ready(driver: Any, url: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(url)
    WebDriverWait(driver, 30).until(
        lambda d: d.execute_script("return document.documentElement.dataset.ready")
    )


def _capture(driver: Any, path: Path, x: int, y: int, width: int, height: int) -> None:
    # One throw-away picture first: tiles beyond the window are painted late.
    for pause_ms in (300, 900):
        driver.execute_async_script(f"setTimeout(arguments[0], {pause_ms})")
        path.write_bytes(_picture(driver, x, y, width, height))


def _picture(driver: Any, x: int, y: int, width: int, height: int) -> bytes:
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True}
    )
    return base64.b64decode(shot["data"])


def take(page: Path, out: Path) -> None:
    """Writes the five pictures of a page."""
    out.mkdir(parents=True, exist_ok=True)
    url = page.resolve().as_uri()
    with chromium(1280, 900) as driver:
        _wait_ready(driver, url)
        answers = driver.execute_script(
            "return document.getElementById('answers').getBoundingClientRect().top + scrollY"
        )
        _capture(driver, out / "report_desktop.png", 0, 0, 1280, min(int(answers), 3200))
        driver.execute_script("document.getElementById('theme').click()")
        _capture(driver, out / "report_dark.png", 0, 0, 1280, 1800)
        driver.execute_script("document.getElementById('theme').click()")
        driver.execute_script("document.documentElement.style.scrollBehavior='auto';"
                              "document.getElementById('answers').scrollIntoView()")  # fmt: skip
        driver.execute_async_script("setTimeout(arguments[0], 400)")
        driver.save_screenshot(str(out / "report_gallery.png"))
        driver.execute_script("document.querySelector('.card').click()")
        driver.execute_async_script("setTimeout(arguments[0], 500)")
        driver.save_screenshot(str(out / "report_answer.png"))
    with chromium(390, 844, 2.0) as driver:
        _wait_ready(driver, url)
        _capture(driver, out / "report_phone.png", 0, 0, 390, 2400)


def main() -> int:
    """Builds the report of the given runs and takes its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", default="docs/images")
    args = parser.parse_args()
    if not is_available():
        print("no chromium, chromedriver or selenium here", file=sys.stderr)
        return 1
    verbs = argparse.ArgumentParser()
    report.register(verbs.add_subparsers())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        call = verbs.parse_args(["report", *args.runs, "--out", str(page)])
        code: int = call.handler(call)
        take(page, Path(args.out))
    return code


if __name__ == "__main__":
    sys.exit(main())
