r"""The paper's run on a Cloud TPU v6e slice of 16 chips (v6e-16), 32 GB each.

    speciarl train --config=configs/qwen2_5_vl_7b_v6e.py:algo=grpo --workdir=gs://BUCKET/NAME \
        --config.judge.endpoints="('http://HOST:8000/v1',)" \
        --config.eval.judge.endpoints="('http://HOST:8001/v1',)"

NOT YET RUN. Planned (docs/scale.md; a roofline, so a lower bound of time): at least 12 s a step.
As `qwen2_5_vl_7b_cub.py` (its arguments too), laid out for this slice: a replica is the four chips
of a host, all hosts sample as one program. Completions end at 1,792 tokens, images above 504 x 504
px are scaled down (CUB's are smaller).
"""

from speciarl_jax.config import recipes


def get_config(arg=None):
    """The recipe; `arg` as in `qwen2_5_vl_7b_cub.py`."""
    config = recipes.neighbour(__file__, "qwen2_5_vl_7b_cub.py", arg)
    config.name = "qwen2_5_vl_7b_v6e"
    config.mesh.auto, config.mesh.tensor = False, 4
    config.data.prompt_buckets, config.data.max_prompt_tokens = (512,), 512
    config.data.window_buckets, config.data.max_pixels = (25,), 504 * 504
    config.rollout.max_cache_mb = 12_000
    config.rollout.max_completion_tokens = 1792
    config.rollout.warm_up = True
    config.train.prompts_per_micro_batch = 1
    return config
