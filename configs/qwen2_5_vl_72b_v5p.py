r"""The paper's run with Qwen2.5-VL-72B on a Cloud TPU v5p slice of 64 chips (v5p-128).

    speciarl train --config=configs/qwen2_5_vl_72b_v5p.py:algo=grpo --workdir=gs://BUCKET/NAME \
        --config.judge.endpoints="('http://HOST:8000/v1',)" \
        --config.eval.judge.endpoints="('http://HOST:8001/v1',)"

NOT YET RUN. Planned (docs/scale.md; a roofline, so a lower bound of time): at least 45 s a step;
memory with this layout has not been compiled.
As `qwen2_5_vl_7b_cub.py` (its arguments too), laid out for this slice: a replica is the eight chips
of two hosts, all hosts sample as one program. Images above 504 x 504 px are scaled down (CUB's are
smaller).
The weights, 147 GB, do not fit a TPU VM's boot disk of 100 GB: `DATA_DISK=NAME` with
tpu_scripts/create.sh attaches one that holds them, --config.model.path=/mnt/disks/data/FOLDER.
"""

from speciarl_jax.config import recipes


def get_config(arg=None):
    """The recipe; `arg` as in `qwen2_5_vl_7b_cub.py`."""
    config = recipes.neighbour(__file__, "qwen2_5_vl_7b_cub.py", arg)
    config.model.path = "Qwen/Qwen2.5-VL-72B-Instruct"
    config.name = "qwen2_5_vl_72b_v5p"
    config.mesh.auto, config.mesh.tensor = False, 8
    config.data.prompt_buckets, config.data.max_prompt_tokens = (512,), 512
    config.data.window_buckets, config.data.max_pixels = (25,), 504 * 504
    config.rollout.max_cache_mb = 30_000
    config.rollout.warm_up = True
    config.train.prompts_per_micro_batch = 1
    # One group. A scan over micro-batches would keep a second layout of the weights: 22 GiB.
    config.train.micro_batch_tokens = 512 + 10 * 2048
    return config
