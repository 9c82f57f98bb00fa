"""Your own pictures: a folder with one sub-folder per class, nested ones being the taxonomy.

    speciarl train --config=configs/folder.py:PATH --workdir=DIR
    speciarl eval  --config=configs/folder.py:PATH --workdir=DIR

The nested folder names become the offline judge's tree. A fifth of every class is set aside for
evaluation, or the folder `test` if PATH has folders `train` and `test`. For validations on the way
add --config.train.eval_every=5 --config.data.num_validation=20: without a folder `validation`, so
many pictures are held out of training.
Hardware: as the model asks for; the default is the small policy on a CPU, which knows only the
field guide. For real pictures: --config.model.path=Qwen/Qwen2.5-VL-3B-Instruct
--config.data.prompt=specific --config.rollout.max_completion_tokens=512
--config.eval.max_completion_tokens=512, and a judge with --config.judge.kind=endpoint.
"""

import hashlib
import json
import pathlib
import tempfile

from speciarl_jax import config as schema
from speciarl_jax.data.sources.folder import dataset_name, folder_taxonomy


def get_config(arg=None):
    """The recipe; `arg` is the folder."""
    if not arg or not pathlib.Path(arg).is_dir():
        raise ValueError(f"configs/folder.py:{arg}: expected a folder of class folders")
    config = schema.Config(name="folder")
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.data.source = f"folder:{arg}"
    config.data.eval_sources = (f"folder:{arg}",)
    config.data.in_domain = (dataset_name(pathlib.Path(arg)),)
    config.data.prompt = "field_guide"
    config.judge.taxonomy = str(_write_tree(json.dumps(folder_taxonomy(arg))))
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


def _write_tree(text):
    """A temporary file named by its content: loading the recipe again adds no second one."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = pathlib.Path(tempfile.gettempdir()) / f"speciarl-taxonomy-{digest}.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file
