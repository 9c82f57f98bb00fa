"""A run directory that looks like a real one: field-guide names, drawn images, hostile answers."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from speciarl_jax.judge.base import Pair, failure
from speciarl_jax.judge.store.verdict_log import VerdictLog
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.scoring.bootstrap import ScoringRule
from speciarl_jax.scoring.metrics import metrics_json
from speciarl_jax.scoring.predictions import Prediction, write_predictions
from speciarl_jax.types import Category, FailureKind, Verdict

HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">",
    "</script><svg onload=alert(1)>",
    "\u202eright to left override\u202c "
    "\u05e2\u05d5\u05e8\u05d1 \u2067\u063a\u0631\u0627\u0628\u2069",
    "wordwithoutanyspaces" * 400,
    "nul \x00 bell \x07 and lone surrogate \ud800 \u2028 line separator",
)
_COLOURS = {
    "scarlet": "#c8382f", "golden": "#e0b03a", "azure": "#3b7fc4", "jade": "#3d9a68",
    "ivory": "#e9e4d4", "sable": "#3b3632",
}  # fmt: skip
_GENERA = {
    "birds": {"songbird": ("finch", "wren"), "wader": ("heron", "ibis")},
    "flowers": {"daisy family": ("aster", "cosmos"), "lily family": ("tulip", "bellflower")},
    "dogs": {"hound": ("beagle", "whippet"), "spitz": ("husky", "corgi")},
}
_DOMAIN = {"birds": "bird", "flowers": "flower", "dogs": "dog"}
# Chances of wrong, abstain, generic, less specific, specific, more specific; format failure last.
BASE = (0.14, 0.03, 0.45, 0.20, 0.16, 0.0, 0.02)
TRAINED = (0.15, 0.03, 0.10, 0.22, 0.47, 0.02, 0.01)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One image and its names from broad to narrow."""

    prompt_id: str
    dataset: str
    image: str
    names: tuple[str, str, str, str]


def _draw(rng: np.random.Generator, colour: str, kind: int) -> bytes:
    width, height = (int(v) for v in rng.integers(96, 160, 2))
    sky = tuple(int(v) for v in rng.integers(150, 235, 3))
    image = Image.new("RGB", (width, height), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.7, width, height), fill=(120, 150, 90))
    x, y = width * rng.uniform(0.35, 0.6), height * rng.uniform(0.4, 0.6)
    r = min(width, height) * rng.uniform(0.2, 0.3)
    fill = _COLOURS[colour]
    if kind == 1:
        for a in np.linspace(0, 2 * np.pi, 8, endpoint=False):
            cx, cy = x + r * np.cos(a), y + r * np.sin(a)
            draw.ellipse((cx - r / 2, cy - r / 2, cx + r / 2, cy + r / 2), fill=fill)
        draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill="#f4d03f")
    else:
        draw.ellipse((x - 1.4 * r, y - 0.8 * r, x + 1.4 * r, y + 0.8 * r), fill=fill)
        draw.ellipse((x + 0.8 * r, y - 1.5 * r, x + 1.9 * r, y - 0.4 * r), fill=fill)
        beak = [(x + 1.8 * r, y - r), (x + 2.3 * r, y - 0.85 * r), (x + 1.8 * r, y - 0.7 * r)]
        draw.polygon(beak, fill="#333")
        draw.line((x, y + 0.7 * r, x, y + 1.5 * r), fill="#333", width=3)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _things(run: Path, dataset: str, split: str, count: int, seed: int) -> list[Thing]:
    rng = np.random.default_rng([seed, len(dataset), len(split)])
    families = _GENERA[dataset]
    things = []
    for i in range(count):
        family = str(rng.choice(list(families)))
        genus = str(rng.choice(families[family]))
        colour = str(rng.choice(list(_COLOURS)))
        prompt_id = f"field_guide_{dataset}/{split}/{i:06d}"
        names = (_DOMAIN[dataset], family, genus, f"{colour} {genus}")
        image = save_thumbnail(run, prompt_id, _draw(rng, colour, list(_GENERA).index(dataset)))
        things.append(Thing(prompt_id, f"field_guide_{dataset}", image, names))
    return things


def _row(
    rng: np.random.Generator, thing: Thing, chances: tuple[float, ...], index: int
) -> Prediction:
    outcome = int(rng.choice(7, p=np.asarray(chances) / sum(chances)))
    domain, family, genus, species = thing.names
    others = [c for c in _COLOURS if not species.startswith(c)]
    said = (
        f"{rng.choice(others)} {genus}", "None", rng.choice([domain, family]), genus, species,
        f"male {species}", None,
    )[outcome]  # fmt: skip
    parts = rng.choice(["short tail", "plain body", "dark legs", "barred wings", "round head"], 3)
    think = (
        f"<think>I see {', '.join(parts)}; the colour suggests a {species.split()[0]} form. "
        f"That supports {('no name', domain, family, genus, species)[outcome % 5]}.</think>"
    )
    completion = think if said is None else f"{think}<answer>{said}</answer>"
    return Prediction(
        thing.prompt_id,
        thing.dataset,
        thing.image,
        species,
        completion,
        None if said is None else str(said),
        None if said is None else Category(outcome),
        -1.0 if said is None else float(outcome >= 3),
        index,
    )


def _with_advantage(rows: list[Prediction], step: int) -> list[Prediction]:
    rewards = np.array([r.reward for r in rows])
    spread = rewards.std(ddof=1) + 1e-6
    return [
        dataclasses.replace(r, step=step, advantage=float((r.reward - rewards.mean()) / spread))
        for r in rows
    ]


def _mix(t: float) -> tuple[float, ...]:
    return tuple((1 - t) * a + t * b for a, b in zip(BASE, TRAINED, strict=True))


def make_run(
    run: Path,
    *,
    steps: int = 40,
    prompts: int = 8,
    group: int = 8,
    eval_images: int = 60,
    train_images: int = 96,
    gain: float = 1.0,
    seed: int = 0,
) -> Path:
    """Writes a whole run directory.

    Args:
        run: made if missing.
        steps: training steps in metrics.jsonl and rollouts/.
        prompts: images per step.
        group: answers per image.
        eval_images: test images per data set.
        train_images: distinct training images.
        gain: 0 to 1, how far training goes.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    train = _things(run, "birds", "train", train_images, 7)
    lines = []
    for step in range(1, steps + 1):
        t = gain * step / steps
        chosen = rng.choice(len(train), prompts)
        rows = []
        for i in dict.fromkeys(chosen.tolist()):
            answers = [_row(rng, train[i], _mix(t), s) for s in range(group)]
            rows += _with_advantage(answers, step)
        write_predictions(run / "rollouts" / f"step_{step:06d}.jsonl", rows)
        lines.append(json.dumps(_metrics(rng, step, t, rows)))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    tests = [t for d in _GENERA for t in _things(run, d, "test", eval_images, 7)]
    for stage, chances in (("base", BASE), ("trained", _mix(gain))):
        rows = [_row(rng, thing, chances, 0) for thing in tests]
        if stage == "trained":
            rows = _make_hostile(rows)
        _write_stage(run / "eval" / stage, rows)
    many = [_row(rng, thing, BASE, s) for thing in tests for s in range(16)]
    _write_stage(run / "eval" / "best_of", many)
    _write_verdicts(run)
    (run / "taxonomy.json").write_text(json.dumps(_tree()))
    config = {
        "name": "cpu_smoke",
        "judge": {"taxonomy": str(run / "taxonomy.json")},
        "data": {"in_domain": ["field_guide_birds"]},
        "rollout": {"group_size": group},
        "note": HOSTILE[0],
    }
    (run / "config.json").write_text(json.dumps(config))
    return run


def _write_verdicts(run: Path) -> None:
    """A log with a frequent pair, a disagreement, a failure and a hostile answer."""
    log = VerdictLog(str(run / "verdicts.sqlite"))
    finch = Pair("scarlet finch", "finch")
    log.add(1, [finch] * 3, [Verdict(Category.LESS_SPECIFIC, "model")] * 3)
    log.add(4, [finch], [Verdict(Category.GENERIC, "other model")])
    log.add(2, [Pair("azure wren", HOSTILE[0])], [Verdict(Category.WRONG, "model")])
    log.add(2, [Pair("azure wren", "wren")], [failure(FailureKind.TIMEOUT, "no answer")])
    log.close()


def _tree() -> dict[str, object]:
    """The names as the judge's tree."""

    def node(name: str, level: str, children: list[object]) -> dict[str, object]:
        return {"name": name, "level": level, "synonyms": [], "children": children}

    domains: list[object] = []
    for dataset, families in _GENERA.items():
        below: list[object] = []
        for family, genera in families.items():
            species = [[node(f"{c} {g}", "species", []) for c in _COLOURS] for g in genera]
            nodes = [node(g, "genus", list(s)) for g, s in zip(genera, species, strict=True)]
            below.append(node(family, "family", list(nodes)))
        domains.append(node(_DOMAIN[dataset], "domain", below))
    return {"name": "things", "level": "", "synonyms": [], "children": domains}


def _make_hostile(rows: list[Prediction]) -> list[Prediction]:
    """Gives the first rows answers that try to break the page, and one a failed label."""
    changed = [
        dataclasses.replace(
            row,
            prediction=text,
            completion=f"<think>{text}</think><answer>{text}</answer>",
            category=Category.WRONG,
            ground_truth=row.ground_truth if i else f"hostile {text}",
        )
        for i, (text, row) in enumerate(zip(HOSTILE, rows, strict=False))
    ]
    failed = dataclasses.replace(
        rows[len(changed)], category=None, reward=None, failure="timeout: no answer after 11 tries"
    )
    return [*changed, failed, *rows[len(changed) + 1 :]]


def _write_stage(folder: Path, rows: list[Prediction]) -> None:
    write_predictions(folder / "predictions.jsonl", rows)
    metrics = metrics_json(rows, ["field_guide_birds"], ScoringRule(bootstrap_samples=500))
    (folder / "metrics.json").write_text(json.dumps(metrics, allow_nan=False))


def _metrics(
    rng: np.random.Generator, step: int, t: float, rows: list[Prediction]
) -> dict[str, float]:
    row: dict[str, float] = {
        "step": step,
        "reward/mean": float(np.mean([r.reward for r in rows])),
        "policy/kl": 0.08 * t**2 + 0.004 * rng.random(),
        "policy/entropy": 1.1 - 0.5 * t + 0.05 * rng.random(),
        "rollout/completion_tokens_mean": 52 + 14 * t + rng.random(),
        "judge/wait_frac": 0.05 + 0.03 * rng.random(),
        "judge/cache_hit_frac": 0.4 + 0.5 * t,
        "throughput/tokens_per_s_per_chip": 900 + 60 * rng.random(),
        "time/rollout_s": 2.0 + 0.4 * rng.random() + 9 * (step == 1),
        "time/judge_s": 0.2 + 0.1 * rng.random(),
        "time/update_s": 1.4 + 0.2 * rng.random() + 14 * (step == 1),
    }
    for c in Category:
        row[f"category/{c.label}_frac"] = float(np.mean([r.category == c for r in rows]))
    row["category/format_failure_frac"] = float(np.mean([r.category is None for r in rows]))
    if step % 5 == 0:
        for i, name in enumerate(("in_domain", "out_of_domain", "all")):
            s, c = 0.58 + 0.2 * t - 0.02 * i, 0.84 - 0.01 * i
            noise = 0.01 * rng.normal(size=2)
            row |= {
                f"eval/{name}/specificity": s + noise[0],
                f"eval/{name}/correctness": c + noise[1],
                f"eval/{name}/hm": 2 * s * c / (s + c),
            }
    return row
