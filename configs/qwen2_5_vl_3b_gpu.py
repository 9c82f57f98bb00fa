"""Qwen2.5-VL-3B on one GPU of 80 GB: a first real run on CUB with a small batch.

    speciarl train --config=configs/qwen2_5_vl_3b_gpu.py --workdir=DIR \
        --config.judge.endpoints="('http://HOST:8000/v1',)"

NOT YET RUN. Same code as `cpu_smoke.py`, larger numbers. Compiled for gpu:h100x1 without the card:
14.7 of 71.1 usable GiB (shrink), at least 3 s a step: 5 min for 100 steps, 7 min for evaluations:
CUB's test images before and after and 200 pictures held out of training every ten steps. Warm-up is
12 decode programs. See `qwen2_5_vl_7b_cub.py` for the paper's.

jax takes nine tenths of the card, so a judge on the same card has to be given its share. Its 30B
parameters in 8 bit are 29 GiB of weights; with 47 GiB it has room for its caches:

    vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507-FP8 --max-model-len 4096 \
        --gpu-memory-utilization 0.6
    XLA_CLIENT_MEM_FRACTION=0.3 speciarl train ...         (23.7 GiB; `plan` counts with it as well)

On another machine it is named by ``judge.endpoints``, as above, and needs nothing of this card.
"""

from speciarl_jax import config as schema


def get_config(arg=None):
    """The recipe; takes no argument."""
    schema.parse_recipe_arg(arg, {})
    config = schema.Config(name="qwen2_5_vl_3b_gpu")
    config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.data.source = "cub"
    config.data.num_train = 1024
    config.data.eval_sources = ("cub",)
    config.data.in_domain = ("cub",)
    config.data.num_validation = 200  # held out of training: CUB has no third split
    config.data.max_pixels = 448 * 448
    config.data.max_prompt_tokens = 512  # at most 256 of them image
    config.data.prompt_buckets = (384, 512)
    config.data.window_buckets = (16, 20, 25, 36, 64)  # 64: one row of 256 merged tokens
    config.judge.kind = "endpoint"
    config.judge.model = "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8"
    config.judge.endpoints = ("http://127.0.0.1:8000/v1",)
    config.rollout.group_size = 8
    config.rollout.max_completion_tokens = 512
    config.rollout.chunk_tokens = 64
    config.rollout.warm_up = True
    config.train.num_steps = 100
    config.train.prompts_per_step = 32
    config.train.prompts_per_update = 32
    config.train.prompts_per_micro_batch = 1
    config.train.mismatch_gate = 0.05
    config.train.eval_every = 10
    config.eval.max_completion_tokens = 512
    return config
