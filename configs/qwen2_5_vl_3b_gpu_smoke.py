"""Qwen2.5-VL-3B end to end on one GPU: birds of the field guide, judged offline, no other service.

    speciarl train --config=configs/qwen2_5_vl_3b_gpu_smoke.py:memory=24 --workdir=DIR

NOT YET RUN. Compiled without the card, memory=24 for an L4: 10.0 of 19.8 usable GiB a device
(update), at least 10 s a step, 5 min for 30 steps; memory=80 for an A100: 12.6 of 71.1 usable GiB a
device (update), at least 3 s a step, 1 min for 30 steps.
Arguments: memory=24 (L4, A10G, RTX 4090) or 80 (A100, H100, H200), GB of the card; steps=30. It
shows that a real checkpoint loads, samples, is judged and learns; the field guide is too easy to
say more. For CUB see `qwen2_5_vl_3b_gpu.py`.
"""

from speciarl_jax import config as schema

DEFAULTS = {"memory": "24", "steps": "30"}
PROMPTS_PER_MICRO_BATCH = {"24": 2, "80": 8}


def get_config(arg=None):
    """The recipe; `arg` is ``key=value,...`` out of `DEFAULTS`."""
    values = schema.parse_recipe_arg(arg, DEFAULTS)
    if values["memory"] not in PROMPTS_PER_MICRO_BATCH:
        known = ", ".join(PROMPTS_PER_MICRO_BATCH)
        raise ValueError(f"memory={values['memory']}: expected one of {known}")
    config = schema.Config(name="qwen2_5_vl_3b_gpu_smoke")
    config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.data.source = "field_guide_birds"
    config.data.eval_sources = ("field_guide_birds", "field_guide_flowers")
    config.data.num_eval = 64
    config.data.prompt = "specific"
    config.data.prompt_buckets, config.data.max_prompt_tokens = (256,), 256
    config.data.window_buckets, config.data.max_pixels = (4,), 224 * 224
    config.rollout.group_size = 8
    config.rollout.max_completion_tokens = 256
    config.rollout.chunk_tokens = 32
    config.rollout.max_cache_mb = 4000
    config.optim.learning_rate = 1e-4
    config.train.num_steps = int(values["steps"])
    config.train.prompts_per_step = config.train.prompts_per_update = 16
    config.train.prompts_per_micro_batch = PROMPTS_PER_MICRO_BATCH[values["memory"]]
    config.train.mismatch_gate = 0.05
    config.eval.max_completion_tokens = 256
    return config
