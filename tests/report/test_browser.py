"""The page in a real browser: filters, keyboard, hostile answers, a large gallery."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speciarl_jax.report.load import load_run
from speciarl_jax.report.page import ReportOptions, build_page
from tests.support.browser import chromium, is_available
from tests.support.synthetic_run import HOSTILE, make_run

pytestmark = pytest.mark.skipif(not is_available(), reason="no chromium, chromedriver or selenium")


def _wait(driver: Any, script: str, seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = driver.execute_script(f"return {script}")
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"never true: {script}")


def _open(driver: Any, page: Path) -> None:
    """Loads the page and goes to the gallery, whose cards exist only near the window."""
    driver.get(page.as_uri())
    _wait(driver, "document.documentElement.dataset.ready")
    driver.execute_script(
        "document.getElementById('answers').scrollIntoView({behavior: 'instant'})"
    )
    _wait(driver, "document.querySelector('.card')")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    run = make_run(folder / "run", steps=12, prompts=4, eval_images=40)
    options = ReportOptions(taxonomy=run / "taxonomy.json", bootstrap_samples=200)
    out = folder / "report.html"
    out.write_text(build_page([load_run(run)], options), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    _open(browser, page)
    return browser


def _select(driver: Any, name: str, text: str) -> None:
    driver.execute_script(
        "const s = document.getElementById(arguments[0]);"
        "s.value = [...s.options].find(o => o.textContent === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'))",
        name,
        text,
    )


def _keys(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def _status(driver: Any) -> str:
    return str(driver.find_element("id", "status").text)


def _messages(driver: Any) -> list[str]:
    return [m["message"] for m in driver.get_log("browser") if m["level"] == "SEVERE"]


def test_filters(opened: Any) -> None:
    assert _status(opened).startswith("120 answers to 120 images")
    _select(opened, "dataset", "field guide dogs")
    assert _status(opened).startswith("40 answers to 40 images")
    chip = opened.find_element("css selector", ".chip[data-code='5']")  # specific
    expected = chip.find_element("tag name", "output").text
    chip.click()
    assert _status(opened).startswith(f"{expected} answers to {expected} images")
    dots = opened.find_elements("css selector", ".card .line:nth-child(2) .dot")
    assert {d.get_attribute("class") for d in dots} == {"dot specific"}
    opened.find_element("id", "find").send_keys("husky")
    cards = opened.find_elements("css selector", ".card")
    assert cards
    assert all("husky" in c.text for c in cards)
    opened.find_element("id", "find").send_keys("zzz")
    assert _status(opened) == "Nothing matches these filters."
    assert not _messages(opened)


def test_most_changed_since_base_comes_first(opened: Any) -> None:
    _select(opened, "sort", "most worsened since base")
    changes = [float(e.text[2:]) for e in opened.find_elements("css selector", ".change")][:6]
    assert changes == sorted(changes, reverse=True)
    assert opened.find_element("css selector", ".change").text.startswith("▼")
    assert "was" in opened.find_element("css selector", ".card").text


def test_keyboard_alone(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    _keys(opened, "/")
    assert opened.switch_to.active_element.get_attribute("id") == "find"
    for _ in range(12):  # the chips, then the first card
        _keys(opened, Keys.TAB)
        if "card" in (opened.switch_to.active_element.get_attribute("class") or ""):
            break
    assert opened.switch_to.active_element.get_attribute("aria-posinset") == "1"
    _keys(opened, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    columns = opened.execute_script(
        "return new Set([...document.querySelectorAll('.card')].map(c => c.style.left)).size"
    )
    assert opened.switch_to.active_element.get_attribute("aria-posinset") == str(2 + columns)
    _keys(opened, Keys.END)
    assert opened.switch_to.active_element.get_attribute("aria-posinset") == "120"
    _keys(opened, Keys.HOME, Keys.ENTER)
    assert opened.execute_script("return document.getElementById('dialog').open")
    first = opened.find_element("css selector", "#detail h3").text
    _keys(opened, Keys.ARROW_RIGHT)
    assert opened.find_element("css selector", "#detail h3").text != first
    _keys(opened, Keys.ESCAPE)
    _wait(opened, "!document.getElementById('dialog').open")
    _wait(opened, "document.activeElement.getAttribute('aria-posinset') === '2'")


def test_open_an_answer(opened: Any) -> None:
    _select(opened, "stage", "training")
    opened.find_element("css selector", ".card").click()
    answers = opened.find_elements("css selector", "#detail .answer")
    assert len(answers) >= 8
    assert "advantage" in opened.find_element("css selector", "#detail .facts").text
    text = _wait(opened, "document.querySelector('#detail details[open] .text').textContent")
    assert "<think>" in text
    assert opened.execute_script("return document.querySelector('#detail img').naturalWidth") > 30


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_answers_are_only_text(opened: Any, number: int) -> None:
    title = opened.title
    nodes = opened.execute_script("return document.querySelectorAll('script').length")
    _select(opened, "sort", "as written")
    opened.find_elements("css selector", ".card")[number].click()
    text = _wait(opened, "document.querySelector('#detail details[open] .text').textContent")
    expected = HOSTILE[number].replace("\ud800", "?").replace("\x00", "\0")
    assert expected in text.replace(" <think> ", "").replace(" </think> ", "")
    assert opened.title == title
    assert opened.execute_script("return document.querySelectorAll('script').length") == nodes
    # Nothing hostile became an element, and nothing is wider than the window.
    assert not opened.find_elements("css selector", "main img[src=x], dialog svg, dialog script")
    wide = opened.execute_script(
        "const d = document.getElementById('dialog');"
        "return [d.scrollWidth - d.clientWidth, document.body.scrollWidth - innerWidth]"
    )
    assert max(wide) <= 0
    heading = opened.execute_script(
        "return getComputedStyle(document.querySelector('#detail h3 bdi')).unicodeBidi"
    )
    assert heading in ("isolate", "isolate-override")
    assert not _messages(opened)


def test_an_injected_script_would_not_run(opened: Any) -> None:
    opened.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
        "document.body.append(s); const i = document.createElement('img');"
        "i.setAttribute('onerror', 'window.hit = 1'); i.src = 'data:,'; document.body.append(i)"
    )
    time.sleep(0.1)
    assert opened.execute_script("return window.hit === undefined")
    assert any("Content Security Policy" in m for m in _messages(opened))


def test_dark_mode_and_print(opened: Any) -> None:
    def colour() -> str:
        return str(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = colour()
    opened.find_element("id", "theme").click()
    assert colour() != light
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert colour() == light
        assert not opened.find_element("id", "filters").is_displayed()
        assert opened.find_element("css selector", ".headline").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_phone_has_no_sideways_scroll(page: Path) -> None:
    with chromium(390, 844, 2.0) as driver:
        _open(driver, page)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        driver.execute_script("document.querySelector('.card').click()")
        box = driver.execute_script(
            "const r = document.getElementById('dialog').getBoundingClientRect();"
            "return [r.left, r.right]"
        )
        assert box[0] >= 0
        assert box[1] <= 390
        assert driver.execute_script("const d = document.getElementById('dialog');"
                                     "return d.scrollWidth <= d.clientWidth")  # fmt: skip
