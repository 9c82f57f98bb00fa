"""A folder of pictures with alpha, odd names and mixed sizes, trained and scored by command."""

import json

import numpy as np
import pytest
from PIL import Image

from speciarl_jax.data.field_guide.specimens import draw_specimens, render
from tests.support.training import run_cli

SPECIES = 3


def make_folder(root):
    """songbird/finch/<species>/..., a few formats, an alpha channel, one file that is no image."""
    chosen = {}
    for specimen in draw_specimens("bird", "test", 96):
        species = specimen.species
        if species.genus == "finch" and (species.name in chosen or len(chosen) < SPECIES):
            chosen.setdefault(species.name, []).append(specimen)
    for name, specimens in chosen.items():
        folder = root / "songbird" / "finch" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for number, specimen in enumerate(specimens[:4]):
            image = render(specimen)
            if number == 0:
                image.putalpha(Image.fromarray(np.full(image.size[::-1], 200, np.uint8)))
                image.save(folder / "été #1 (copy).png")
            elif number == 1:
                image.resize((301, 97)).save(folder / "b.JPG", quality=90)
            else:
                image.convert("P").save(folder / f"c{number}.gif")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    return root


@pytest.mark.slow
def test_folder_trains_and_evaluates_end_to_end(tmp_path):
    pictures, workdir = make_folder(tmp_path / "my pictures"), tmp_path / "run"
    recipe = f"--config=configs/folder.py:{pictures}"
    options = [
        "--config.train.num_steps=2",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.data.bad_image_budget_frac=0.4",
        "--config.train.prompts_per_step=2",
        "--config.train.prompts_per_update=2",
        "--config.train.prompts_per_micro_batch=2",
        "--config.mesh.data=1",  # the tests' eight fake devices would be eight replicas
    ]
    result = run_cli("train", recipe, f"--workdir={workdir}", *options)
    assert result.returncode == 0, result.stderr
    assert "before and after training" in result.stdout
    result = run_cli("eval", recipe, f"--workdir={workdir}", "--json", *options)
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    (dataset,) = scores["datasets"].values()
    assert dataset["n"] > 0
    assert "in_domain" in scores["averages"]
