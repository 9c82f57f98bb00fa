"""Everything of the report that needs no browser: reading, packing, escaping, tables, the verbs."""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from speciarl_jax.cli import report
from speciarl_jax.config.schema import Config
from speciarl_jax.evaluate import write_scores
from speciarl_jax.judge.offline.name_trees import Node
from speciarl_jax.monitor.console import report_end
from speciarl_jax.report import html, sections, thumbnails
from speciarl_jax.report.compare import compare, headline_csv, headline_latex, load_evaluation
from speciarl_jax.report.gallery import build_gallery
from speciarl_jax.report.levels import NameTree
from speciarl_jax.report.load import load_run, load_runs, read_series
from speciarl_jax.report.page import ReportOptions, build_page
from speciarl_jax.report.plots import plot_training
from speciarl_jax.report.tables import (
    comparison_table,
    format_estimate,
    format_value,
    metrics_table,
)
from speciarl_jax.scoring.metrics import metrics_json
from speciarl_jax.scoring.predictions import Prediction, read_predictions, write_predictions
from speciarl_jax.scoring.text_metrics import score_text
from speciarl_jax.types import Category
from tests.support.synthetic_run import HOSTILE, make_run

BUDGET = 5_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("r") / "run", steps=12, prompts=4, eval_images=30)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return build_page([load_run(run)], ReportOptions(bootstrap_samples=100))


def call(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    report.register(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    return args.handler(args)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def inflate(text: str) -> dict:
    return json.loads(zlib.decompress(base64.b64decode(text)))


# --- the page --------------------------------------------------------------------------------


def test_page_stands_alone(page: str) -> None:
    outside = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert all(link.startswith(("#", "data:")) for link in outside)
    assert "@import" not in page
    assert "url(http" not in page
    assert re.search(r"default-src 'none'; script-src 'sha256-[\w+/=]+'", page)


def test_page_holds_no_hostile_markup(page: str) -> None:
    body = page[page.index("<body>") :]
    assert HOSTILE[0] not in body  # it is the note of the recipe, a ground truth and an answer
    assert "&lt;script&gt;document.title" in body
    assert "\u202e" not in body
    assert body.count("<script") == 4  # three blocks of data, one script
    assert "innerHTML" not in page
    assert "insertAdjacentHTML" not in page


def test_page_has_every_section(page: str) -> None:
    for text in (
        "zero-shot", "best of 16 (oracle)", "</bdi> minus <bdi>", "What became of the answers",
        "Best of k", "Mean reward", "Categories of sampled answers", "Time per step",
        "Correctness against specificity", "Recipe of", "tokens per second and chip",
    ):  # fmt: skip
        assert text in page, text
    assert len(re.findall(r'<svg viewBox="[^"]*" role="img"', page)) >= 10
    # Charts take their colours from the theme.
    chart = page[page.index('aria-label="Mean reward"') :][:20_000]
    assert "var(--line0)" in chart
    assert "#1f6fb2" not in chart


def test_judge_section(run: Path, page: str) -> None:
    """Numbers of `synthetic._write_verdicts`: 6 labels asked for, 3 pairs, one of them failed."""
    section = page[page.index('id="judge"') : page.index('id="cost"')]
    cells = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', section)
    facts = dict(cells)
    assert facts["labels asked for"] == "6"
    assert facts["different pairs"] == "3"
    assert facts["without a label"] == "1 (16.7%)"
    assert facts["decided by model"] == "4"
    assert facts["decided by other model"] == "1"
    assert facts["from the cache"] == "90.0%"
    assert "less specific: given 3× to 1 different" in section
    assert "failed:timeout: given 1× to 1 different" in section
    assert "Pairs with two different labels: 1." in section
    assert "less specific 3× (model), generic 1× (other model)" in section
    assert "&lt;script&gt;" in section
    assert 'href="#judge"' in page


def test_no_judge_section_without_a_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    page = build_page([load_run(tmp_path)], ReportOptions())
    assert "#judge" not in page
    assert not (tmp_path / "verdicts.sqlite").exists()


def test_text_metrics_in_the_table_of_every_data_set(run: Path) -> None:
    loaded = load_run(run)
    text = score_text(loaded.stages[-1].predictions, bootstrap_samples=50)
    loaded.stages[-1].metrics["text"] = text
    table = sections.per_dataset([loaded])
    assert '<th scope="col">text inclusion</th>' in table
    assert "semantic similarity" not in table
    value = text["averages"]["all"]["text_inclusion"]["value"]
    assert format_value(value) in table


def test_two_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = make_run(
        tmp_path / "weaker $x_1$", steps=6, prompts=3, eval_images=30, gain=0.3, seed=4
    )
    page = build_page(load_runs([str(run), str(other)]), ReportOptions(bootstrap_samples=100))
    assert "weaker $x_1$" in page
    assert page.count("</bdi> minus <bdi>") == 3


def test_page_of_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "rew')
    page = build_page([load_run(tmp_path)], ReportOptions())
    assert "Nothing was evaluated yet" in page


def test_page_where_everything_is_wrong(tmp_path: Path) -> None:
    rows = [Prediction(f"b/test/{i}", "b", "", "x", "", "y", Category.WRONG, 0.0, 0)
            for i in range(3)]  # fmt: skip
    write_predictions(tmp_path / "predictions.jsonl", rows)
    page = build_page([load_run(tmp_path)], ReportOptions())
    assert "—" in page


def test_budget_that_holds_nothing(run: Path) -> None:
    with pytest.raises(ValueError, match="max_mb=1, max_rollouts=20000: a page needs"):
        build_page([load_run(run)], ReportOptions(max_mb=1))


# --- gallery and thumbnails --------------------------------------------------------------------


def test_gallery_holds_every_row(run: Path) -> None:
    loaded = load_run(run)
    gallery = build_gallery([loaded], 20_000, BUDGET)
    index = inflate(gallery.index)
    rows = [p for s in loaded.stages for p in s.predictions] + loaded.rollouts
    assert gallery.shown == gallery.total == len(rows) == sum(index["group_size"])
    starts = index["chunks"]
    texts = [t for a, b in itertools.pairwise(starts)
             for t in inflate(gallery.completions[a:b])]  # fmt: skip
    kept = {t for t in texts if len(t) < 500}
    assert {p.completion for p in rows if len(p.completion) < 500} == kept
    start, length = index["thumbs"][:2]
    image = Image.open(io.BytesIO(base64.b64decode(gallery.images[start : start + length])))
    assert max(image.size) == 128
    assert not gallery.notes


def test_gallery_keeps_its_budget(run: Path) -> None:
    loaded = load_run(run)
    gallery = build_gallery([loaded], 20_000, 150_000)
    used = len(gallery.index) + len(gallery.completions) + len(gallery.images)
    assert used <= 150_000
    assert any("Thumbnails are" in note for note in gallery.notes)
    few = build_gallery([loaded], 1_600, BUDGET)
    assert few.shown <= 1_600
    assert f"{few.shown:,} of {few.total:,} rollouts" in few.notes[0]
    steps = [s for s in inflate(few.index)["group_step"] if s >= 0]
    assert min(steps) <= 3  # what is kept of the training is spread over it
    assert max(steps) >= 10
    # The same images are kept of every evaluation, so that they can be compared.
    few = build_gallery([loaded], 100, BUDGET)
    index = inflate(few.index)
    kept = [set(), set(), set(), set()]
    for stage, image in zip(index["group_stage"], index["group_image"], strict=True):
        kept[stage].add(image)
    assert len(kept[0]) > 30
    assert len(kept[0] ^ kept[2]) <= 1


def test_image_never_leads_outside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (run / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "a\0b", "x" * 5000):
        assert thumbnails.find_image(run, name, "p") is None
    (run / "own.jpg").write_bytes(b"x")
    assert thumbnails.find_image(run, "own.jpg", "p") == run.resolve() / "own.jpg"


def test_thumbnails(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (400, 100), "red").save(out, "PNG")
    hostile_id = "../../etc/" + "é/" * 300
    name = thumbnails.save_thumbnail(tmp_path, hostile_id, out.getvalue())
    assert (tmp_path / name).parent == tmp_path / "thumbnails"
    assert size(tmp_path / name) == (128, 32)
    assert thumbnails.save_thumbnail(tmp_path, hostile_id, b"never read") == name
    assert thumbnails.save_thumbnail(tmp_path, "bad", b"no image") == ""
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    assert thumbnails.save_thumbnail(tmp_path, "bomb", bomb.getvalue()) == ""
    text, spans, _ = thumbnails.pack([tmp_path / name, None], 10**6)
    assert spans == [(0, len(text)), (0, 0)]


# --- HTML, levels, tables ----------------------------------------------------------------------


def test_elements_escape() -> None:
    markup = html.el("td", "<b>&", html.el("i", '"'), title='a"b<', data_x=1, hidden=True)
    assert markup == '<td title="a&quot;b&lt;" data-x="1" hidden>&lt;b&gt;&amp;<i>&quot;</i></td>'
    with pytest.raises(ValueError, match="attribute"):
        html.el("td", **{"on click": "x"})


def test_levels() -> None:
    names = [("bird", "domain", ()), ("songbird", "family", (0,)), ("finch", "genus", (1,)),
             ("wren", "genus", (1,)), ("scarlet finch", "species", (2,)),
             ("azure finch", "species", (2,)), ("house wren", "species", (3,)),
             ("plane", "domain", ())]  # fmt: skip
    tree = NameTree([Node(n, (), level, parents) for n, level, parents in names])
    assert tree.levels() == ["domain", "family", "genus", "species"]
    place = tree.place
    assert place("scarlet finch", "a Finch") == ("genus", "right")
    assert place("scarlet finch", "birds") == ("domain", "right")
    assert place("scarlet finch", "azure finch") == ("species", "same genus")
    assert place("scarlet finch", "house wren") == ("species", "same family")
    assert place("scarlet finch", "wren") == ("genus", "same family")
    assert place("scarlet finch", "plane") == ("domain", "nothing shared")
    assert place("scarlet finch", "sofa") == ("name not in the tree", "nothing shared")
    assert place("scarlet finch", "I don't know") == ("none given", "right")
    assert place("sofa", "finch") is None


def test_format_value() -> None:
    assert [format_value(v) for v in (0.883, 0.0, 1.0, -0.05, None)] == [
        ".883", ".000", "1.000", "-.050", "—",
    ]  # fmt: skip
    assert format_value(0.05, is_signed=True) == "+.050"


def test_terminal_tables(run: Path) -> None:
    loaded = load_run(run)
    base, trained = loaded.stage("base"), loaded.stage("trained")
    assert base is not None
    assert trained is not None
    compared = compare(base.predictions, trained.predictions, ["field_guide_birds"])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(metrics_table(trained.metrics, "Trained"))
    console.print(comparison_table(compared, "Both"))
    text = console.export_text()
    assert "mean out_of_domain" in text
    value = compared["differences"]["mean all"]["hm"]["value"]
    assert format_value(value, is_signed=True) in text
    # How many images changed, where each has one answer with a label on either side.
    counts = {d["discordant"]: d["n_images"] for d in compared["differences"].values()}
    assert any(count is not None for count in counts)
    for count, images in counts.items():
        assert (f" {count}/{images}" if count is not None else "—") in text
    changed = re.search(
        r">changed</th>.*?</table>", sections.comparison(("a", "b"), compared), re.S
    )
    assert all(f"<td>{'—' if c is None else c}</td>" in changed[0] for c in counts)
    # The paired difference is the difference of the two means.
    both = [compared[k]["averages"]["all"]["hm"]["value"] for k in "ab"]
    assert value == pytest.approx(both[1] - both[0])


def test_comparing_other_data_sets(run: Path) -> None:
    rows = read_predictions(run / "eval" / "base" / "predictions.jsonl")
    birds = [p for p in rows if p.dataset == "field_guide_birds"]
    assert compare(rows, birds)["left_out"] == ["field_guide_dogs", "field_guide_flowers"]
    other = [dataclasses.replace(p, dataset="cars") for p in birds]
    with pytest.raises(ValueError, match="no data set in common: field_guide_birds against cars"):
        compare(birds, other)


def test_csv_and_latex() -> None:
    rows = [Prediction(f"b/test/{i}", "=cmd|a_b & c", "", "x", "", "y", Category(i), 0.0, 0)
            for i in range(6)]  # fmt: skip
    metrics = metrics_json(rows)
    table = list(csv.DictReader(io.StringIO(headline_csv({"run": metrics}))))
    assert table[0]["data_set"] == "'=cmd|a_b & c"
    assert float(table[0]["correctness"]) == pytest.approx(5 / 6, abs=1e-6)
    latex = headline_latex({"run_1": metrics})
    assert r"run\_1 & =cmd|a\_b \& c & .700 {\scriptsize [" in latex
    assert latex.count(r"\\") == 2


# --- reading runs -------------------------------------------------------------------------------


def test_load_run(run: Path) -> None:
    loaded = load_run(run)
    assert [s.name for s in loaded.stages] == ["base", "best_of", "trained"]
    assert loaded.final is loaded.stages[-1]
    assert {p.step for p in loaded.rollouts} == set(range(1, 13))
    one = load_run(run / "eval" / "base")
    assert [s.name for s in one.stages] == ["eval"]
    assert load_evaluation(run)[0] == "run/trained"
    assert load_evaluation(run, "base")[0] == load_evaluation(run / "eval" / "base")[0]
    with pytest.raises(ValueError, match=r"no evaluation 'x' \(found: base, best_of, trained\)"):
        load_evaluation(run, "x")


def test_metrics_are_computed_where_the_file_is_missing(run: Path, tmp_path: Path) -> None:
    text = (run / "eval" / "base" / "predictions.jsonl").read_text(encoding="utf-8")
    (tmp_path / "predictions.jsonl").write_text(text, encoding="utf-8")
    stage = load_run(tmp_path).stages[0]
    known = json.loads((run / "eval" / "base" / "metrics.json").read_text())
    assert stage.metrics["averages"]["all"]["n"] == known["averages"]["all"]["n"]


def test_bad_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none: no such run directory"):
        load_run(tmp_path / "none")
    with pytest.raises(ValueError, match="is this a run directory"):
        load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_run(tmp_path)


def test_series_merges_steps_and_skips_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"step": 2, "a": 1, "b": null, "c": NaN, "d": "x", "e": true}\n'
        '{"step": 1, "a": 3}\n{"step": 2, "a": 4, "f": 1}\n'
    )
    assert read_series(path) == {"a": [(1, 3.0), (2, 4.0)], "f": [(2, 1.0)]}


def test_plots(run: Path, tmp_path: Path) -> None:
    files = plot_training(run / "metrics.jsonl", tmp_path / "plots")
    assert [f.name for f in files] == [
        "reward.png", "metrics.png", "categories.png", "policy.png", "training.png",
    ]  # fmt: skip
    assert all(size(f)[0] > 600 for f in files)
    (tmp_path / "one.jsonl").write_text('{"step": 1, "category/wrong_frac": 0.0}\n')
    assert plot_training(tmp_path / "one.jsonl", tmp_path / "b")


# --- the verbs ----------------------------------------------------------------------------------


def test_report_verb(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "a" / "report.html", tmp_path / "t.tex"
    assert call("report", str(run), "--out", str(out), "--latex", str(table), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["out"] == str(out)
    assert out.stat().st_size / 1e6 == pytest.approx(answer["size_mb"])
    assert "how narrow answers are" in out.read_text(encoding="utf-8")
    assert table.read_text().startswith(r"\begin{tabular}")
    with pytest.raises(ValueError, match="--taxonomy=none: no such file"):
        call("report", str(run), "--taxonomy", "none")


def test_compare_verb(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = (str(run / "eval" / "base"), str(run))
    table = tmp_path / "t.csv"
    assert call("compare", *pair, "--json", "--csv", str(table)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["names"] == ["run/base", "run/trained"]
    assert answer["differences"]["mean all"]["specificity"]["value"] > 0
    assert "evaluation,data_set,n,correctness" in table.read_text()
    assert call("compare", *pair) == 0
    assert "run/trained against run/base" in capsys.readouterr().out


def test_a_run_has_the_same_intervals_wherever_they_are_printed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the run's seed: closing table, metrics.json, `compare` and the page."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    config = Config(seed=7)
    config.data.in_domain = ("field_guide_birds",)
    config.eval.bootstrap_samples = 300
    config.eval.format_failures = "separate"
    for name in ("base", "trained"):
        write_scores(config, workdir / "eval" / name)
    console = Console(width=100, record=True, file=io.StringIO())
    report_end(console, workdir, config)
    pair = (str(workdir / "eval" / "base"), str(workdir))
    assert call("compare", *pair) == 0
    intervals = re.compile(r"\[[-+.0-9]+,[-+.0-9]+\]")
    closing = intervals.findall(console.export_text())
    assert closing == intervals.findall(capsys.readouterr().out)
    assert len(closing) >= 3 * 4
    assert call("compare", *pair, "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    loaded = load_run(workdir)
    for side, stage in (("a", "base"), ("b", "trained")):
        assert compared[side] == loaded.stage(stage).metrics
    page = build_page([loaded], ReportOptions())
    shown = compared["differences"]["mean all"]["specificity"]
    assert format_estimate(shown, is_signed=True).split(" ", 1)[1] in page
    assert call("compare", *pair, "--seed=1", "--json") == 0
    other = json.loads(capsys.readouterr().out)["differences"]["mean all"]["specificity"]
    assert other["low"] != shown["low"]


def test_compare_verb_over_seeds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three evaluations as three seeds: the t interval of their means, by hand for one cell."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.copytree(workdir / "eval" / "base", workdir / "eval" / "again")
    dirs = [str(workdir / "eval" / name) for name in ("base", "trained", "again")]
    assert call("compare", *dirs, "--seeds", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    values = [load_evaluation(d)[1].metrics["averages"]["all"]["hm"]["value"] for d in dirs]
    # Of x, y, x the deviation is |y - x| / sqrt(3); t with 2 degrees of freedom is 4.302653.
    half = 4.302653 * abs(values[1] - values[0]) / 3
    found = answer["means"]["mean all"]["hm"]
    assert found["value"] == pytest.approx(sum(values) / 3)
    assert found["high"] - found["value"] == pytest.approx(half, rel=1e-6)
    assert call("compare", *dirs, "--seeds") == 0
    text = capsys.readouterr().out
    assert "mean over 3 seeds" in text
    assert format_value(found["value"]) in text
    with pytest.raises(ValueError, match="3 directories: compare takes two; add --seeds"):
        call("compare", *dirs)
    with pytest.raises(ValueError, match="--seeds takes the values of each"):
        call("compare", *dirs, "--seeds", "--seed=1")


def test_runs_scored_by_different_rules_need_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rule must be named; of two numbers of resamples the larger is taken, or the flag's."""
    workdir = tmp_path / "other"
    shutil.copytree(run, workdir)
    config = Config()
    config.eval.format_failures = "drop"
    config.eval.bootstrap_samples = 600  # the other has 500
    folder = workdir / "eval" / "trained"
    write_scores(config, folder)
    with pytest.raises(ValueError, match="scored with format_failures drop and wrong; choose"):
        call("compare", str(run), str(workdir))
    for flags, samples in ((), 600), (("--bootstrap_samples=50",), 50):
        pair = ("compare", str(run), str(workdir), "--format_failures=drop", *flags, "--json")
        assert call(*pair) == 0
        settings = json.loads(capsys.readouterr().out)["a"]["settings"]
        assert (settings["format_failures"], settings["bootstrap_samples"]) == ("drop", samples)


def test_no_jax_here() -> None:
    code = (
        "import sys, speciarl_jax.report.page, speciarl_jax.cli.report, "
        "speciarl_jax.scoring.text_metrics; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
