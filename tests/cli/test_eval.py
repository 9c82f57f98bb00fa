"""`speciarl eval`: which weights, which folder, files that exist, text metrics."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from speciarl_jax import evaluate, train
from speciarl_jax.cli import eval
from speciarl_jax.cli.eval import EvalOptions
from speciarl_jax.config.schema import Config
from speciarl_jax.convert.adapter import save_peft
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.run.restore import load_run, open_checkpoint, read_config
from speciarl_jax.run.session import open_session
from speciarl_jax.scoring.predictions import Prediction, read_predictions, write_predictions
from speciarl_jax.scoring.sentence_model import open_embedder
from speciarl_jax.types import Category
from tests.support.tiny_policy import small_config as training_config
from tests.support.tiny_sentence_model import write_sentence_model


def small_config(rank=4, alpha=8.0):
    """The shipped policy; nothing here is compiled."""
    config = Config(name="test")
    config.model.path = "tiny"
    config.lora.rank, config.lora.alpha = rank, alpha
    config.data.prompt = "field_guide"
    config.eval.bootstrap_samples = 50
    return config


def row(number, sample=0, said="scarlet finch", category=None):
    return Prediction(
        f"birds/test/{number}", "birds", "", "scarlet finch", f"<answer>{said}</answer>", said,
        category, None, sample,
    )  # fmt: skip


# --- which weights ------------------------------------------------------------------------------


def test_adapter_directory_on_the_recipes_model(tmp_path):
    """Rank and alpha come from the adapter, not from the recipe; the weights are its own."""
    session = open_session(small_config())
    moved = jax.tree.map(lambda leaf: leaf + 0.25, session.parts.trainable)  # B is not zero
    parts = dataclasses.replace(session.parts, trainable=moved)
    save_peft(parts, session.config.lora, "base", tmp_path / "adapter")
    config = small_config(rank=2, alpha=1.0)
    opened, name, weights, step = open_checkpoint(config, tmp_path, str(tmp_path / "adapter"), None)
    assert (name, step) == ("adapter", 0)
    assert weights.startswith(str(tmp_path / "adapter"))
    assert (opened.config.lora.rank, opened.config.lora.alpha) == (4, 8.0)
    assert opened.parts.graphdef == session.parts.graphdef
    for mine, theirs in zip(
        jax.tree.leaves(opened.parts.trainable), jax.tree.leaves(moved),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)


def test_model_directory_and_base(tmp_path):
    path = str(shipped_tiny_dir())
    opened, name, weights, _ = open_checkpoint(small_config(), tmp_path, path, None)
    assert opened.config.model.path == path
    assert name in weights
    _, name, weights, step = open_checkpoint(small_config(), tmp_path, "base", None)
    assert (name, weights, step) == ("base", "", 0)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected latest, base, a step number, a Hugging Face"):
        open_checkpoint(small_config(), tmp_path, str(tmp_path), None)
    with pytest.raises(ValueError, match="no checkpoints; train"):
        open_checkpoint(small_config(), tmp_path / "checkpoints", "latest", None)


def test_recipe_of_a_run_has_sections(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": 3}))
    with pytest.raises(ValueError, match=r"config\.json: train=3, expected an object"):
        read_config(tmp_path)


# --- which folder -------------------------------------------------------------------------------

SETTINGS = {"weights": "step_000002", "samples": 1}


def claimed(folder, settings=SETTINGS):
    evaluate.claim_folder(folder, settings)
    write_predictions(folder / "predictions.jsonl", [row(1)])
    return folder


def test_same_settings_go_on(tmp_path):
    folder = claimed(tmp_path / "trained")
    evaluate.claim_folder(folder, SETTINGS)
    assert (folder / "predictions.jsonl").is_file()


def test_answers_of_another_policy_are_never_mixed_in(tmp_path):
    folder = claimed(tmp_path / "model", {"weights": "/a/model of 1", "samples": 1})
    with pytest.raises(ValueError, match=r"weights='/a/model of 1', now it is '/a/model of 2'"):
        evaluate.claim_folder(folder, {"weights": "/a/model of 2", "samples": 1})
    with pytest.raises(ValueError, match="made with samples=1, now it is 4"):
        evaluate.claim_folder(folder, {"weights": "/a/model of 1", "samples": 4})
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"without settings\.json"):
        evaluate.claim_folder(folder, SETTINGS)


def test_final_score_of_a_run_that_went_on_becomes_that_steps(tmp_path):
    folder = claimed(tmp_path / "trained")
    evaluate.claim_folder(folder, SETTINGS | {"weights": "step_000004"})
    assert not (folder / "predictions.jsonl").exists()
    assert (tmp_path / "step_000002" / "predictions.jsonl").is_file()
    claimed(folder)
    with pytest.raises(ValueError, match="weights='step_000002'"):  # that name is taken now
        evaluate.claim_folder(folder, SETTINGS | {"weights": "step_000004"})


def test_half_written_images_are_drawn_again(tmp_path):
    path = tmp_path / "predictions.jsonl"
    whole = [row(1, 0), row(1, 1)]
    write_predictions(path, [*whole, row(2, 0)])
    assert evaluate.cut_half_images(path, samples=2) == 1
    assert read_predictions(path) == whole
    assert evaluate.cut_half_images(path, samples=2) == 0


# --- files that exist, text metrics -------------------------------------------------------------


def labelled_file(folder):
    """Two answers to one truth: the name itself, not judged yet, and "bird"."""
    file = folder / "mine.jsonl"
    write_predictions(file, [row(1), row(2, said="bird", category=Category.GENERIC)])
    return file


def test_predictions_are_judged_scored_and_measured_as_text(tmp_path, capsys):
    source = labelled_file(tmp_path)
    options = EvalOptions(predictions=str(source), has_text_metrics=True, is_json=True)
    assert eval.score(small_config(), tmp_path / "run", options, None) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["datasets"]["birds"]["specificity"]["value"] == pytest.approx((1 + 0.5) / 2)
    text = shown["text"]["datasets"]["birds"]
    assert text["text_inclusion"]["value"] == 0.5
    assert "semantic_similarity" not in text
    folder = tmp_path / "run" / "eval" / "mine"
    assert json.loads((folder / "metrics.json").read_text()) == shown
    judged = read_predictions(folder / "predictions.jsonl")
    assert [p.category for p in judged] == [Category.SPECIFIC, Category.GENERIC]
    assert read_predictions(source)[0].category is None
    options = dataclasses.replace(options, is_json=False)
    assert eval.score(small_config(), tmp_path / "run", options, None) == 0
    assert "text inclusion" in capsys.readouterr().out


@pytest.mark.parametrize(("use_train_judge", "failed"), [(True, 1.0), (False, 0.0)])
def test_an_evaluation_may_have_a_judge_of_its_own(tmp_path, capsys, use_train_judge, failed):
    """The training judge's tree lacks the truth, that of the evaluation has it."""
    write_predictions(tmp_path / "mine.jsonl", [row(1, said="finch")])
    (tmp_path / "tree.json").write_text('{"name": "thing", "children": [{"name": "boat"}]}')
    config = small_config()
    config.judge.taxonomy = str(tmp_path / "tree.json")
    config.eval.use_train_judge = use_train_judge
    options = EvalOptions(predictions=str(tmp_path / "mine.jsonl"), is_json=True)
    assert eval.score(config, tmp_path / "run", options, None) == 0
    scores = json.loads(capsys.readouterr().out)["datasets"]["birds"]
    assert scores["judge_failure_rate"]["value"] == failed


def test_a_sentence_model_measures_similarity(tmp_path, capsys):
    model = str(write_sentence_model(tmp_path / "sentences", ("scarlet", "finch", "bird")))
    options = EvalOptions(
        predictions=str(labelled_file(tmp_path)),
        has_text_metrics=True,
        text_model=model,
        is_json=True,
    )
    assert eval.score(small_config(), tmp_path / "run", options, None) == 0
    text = json.loads(capsys.readouterr().out)["text"]["datasets"]["birds"]
    truth, bird = open_embedder(model).embed(["scarlet finch", "bird"])
    assert text["semantic_similarity"]["value"] == pytest.approx((1 + truth @ bird) / 2)


def test_contradicting_options(tmp_path):
    with pytest.raises(ValueError, match="give that too"):
        eval.score(small_config(), tmp_path, EvalOptions(text_model="minilm"), None)
    with pytest.raises(ValueError, match="--samples=-1"):
        eval.score(small_config(), tmp_path, EvalOptions(samples=-1), None)


@pytest.mark.slow
def test_run_adapter_and_step_give_the_same_answers(tmp_path, capsys):
    run = tmp_path / "run"
    quiet = {"eval__score_base": False, "eval__score_trained": False}
    train.main(training_config(**quiet), run)
    policy, lora, base = load_run(run)
    save_peft(policy, lora, str(base), tmp_path / "adapter")
    for checkpoint in ("latest", "1", str(tmp_path / "adapter"), "base"):
        options = EvalOptions(checkpoint=checkpoint, is_json=True)
        assert eval.score(training_config(), run, options, None) == 0
    said = {
        name: [p.completion for p in read_predictions(run / "eval" / name / "predictions.jsonl")]
        for name in ("step_000002", "step_000001", "adapter", "base")
    }
    assert said["adapter"] == said["step_000002"]
    assert len(said["base"]) == len(said["step_000001"]) == 8


def test_samples_of_the_policy_are_drawn_with_every_option_of_training():
    config = training_config(
        eval__policy_samples=3, rollout__min_p=0.1, rollout__repetition_penalty=2.0
    )
    exam = evaluate.Exam.test(config).drawn_as_in_training(config)
    assert (exam.samples, exam.sampling.min_p, exam.sampling.repetition_penalty) == (3, 0.1, 2)
    assert exam.split == config.data.eval_split
