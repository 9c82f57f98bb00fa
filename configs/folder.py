"""Your own pictures: a folder with one sub-folder per class, nested ones being the taxonomy.

    speciarl train --config=configs/folder.py:PATH --workdir=DIR
    speciarl eval  --config=configs/folder.py:PATH --workdir=DIR

The nested folder names become the offline judge's tree, written beside the pictures' prepared data.
Hardware: as the model asks for; the default is the small policy on a CPU, which knows only the
field guide: set --config.model.path to a Qwen2.5-VL checkpoint for real pictures.
"""

import json
import pathlib
import tempfile

from speciarl_jax import config as schema
from speciarl_jax.data.folder import dataset_name, folder_taxonomy


def get_config(arg=None):
    """The recipe; `arg` is the folder."""
    if not arg or not pathlib.Path(arg).is_dir():
        raise ValueError(f"configs/folder.py:{arg}: expected a folder of class folders")
    config = schema.Config(name="folder")
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.data.source = f"folder:{arg}"
    config.data.eval_sources = (f"folder:{arg}",)
    config.data.in_domain = (dataset_name(pathlib.Path(arg)),)
    config.data.eval_split = "train"
    config.data.prompt = "field_guide"
    tree = pathlib.Path(tempfile.mkdtemp(prefix="speciarl-taxonomy-")) / "taxonomy.json"
    tree.write_text(json.dumps(folder_taxonomy(arg)), encoding="utf-8")
    config.judge.taxonomy = str(tree)
    config.rollout.group_size = 4
    config.rollout.max_completion_tokens = 48
    config.rollout.chunk_tokens = 12
    config.rollout.compact = False
    config.train.num_steps = 10
    config.train.prompts_per_step = 4
    config.train.prompts_per_update = 4
    config.train.prompts_per_micro_batch = 4
    config.train.save_every = 5
    config.eval.max_completion_tokens = 48
    return config
