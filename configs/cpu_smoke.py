"""SpeciaRL end to end on two CPU cores: the small policy learns to be specific on birds.

    make smoke                      (or: speciarl train --config=configs/cpu_smoke.py --workdir=DIR)

Hardware: 2 cores, 8 GB; about 4 minutes after installation. Trained on birds only, scored on birds
(in domain) and on flowers, aircraft and dogs (out of domain). Expected out of domain: specificity
up by at least .10, correctness down by at most .02, HM up by at least .05 (docs/results.md).
Arguments: reward=dynamic|single|binary|scale1|scale2|scale3, n=10, seed=0, steps=60, support=1,
algo=grpo|dr_grpo|dapo|dapo_dynamic|gspo|rloo.
"""

from speciarl_jax import config as schema
from speciarl_jax.config import recipes

DOMAINS = ("birds", "flowers", "aircraft", "dogs")
DEFAULTS = {
    "reward": "dynamic",
    "algo": "grpo",
    "n": "10",
    "seed": "0",
    "steps": "60",
    "support": "1",
}


def get_config(arg=None):
    """The recipe; `arg` is ``key=value,...`` out of `DEFAULTS`."""
    values = schema.parse_recipe_arg(arg, DEFAULTS)
    config = schema.Config(name="cpu_smoke", seed=int(values["seed"]))
    config.model.path = "tiny"
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.data.source = "field_guide_birds"
    config.data.eval_sources = tuple(f"field_guide_{domain}" for domain in DOMAINS)
    config.data.prompt = "field_guide"
    config.data.prompt_buckets = (48,)  # one shape, one compilation
    config.data.window_buckets = (6,)
    config.rollout.group_size = int(values["n"])
    config.rollout.max_completion_tokens = 48
    config.rollout.chunk_tokens = 12
    config.rollout.compact = False
    config.train.prompts_per_step = 16
    recipes.set_algorithm(config, values["algo"])
    config.algo.reward = values["reward"]
    config.algo.bar_support = float(values["support"])
    config.optim.learning_rate = 3e-4
    config.optim.schedule = "linear"
    config.train.num_steps = int(values["steps"])
    config.train.prompts_per_update = 16
    config.train.prompts_per_micro_batch = 16
    config.train.logprob_chunk_tokens = 4096
    config.train.save_every = 20
    config.train.table_every = 20
    config.train.eval_every = 15
    config.eval.max_completion_tokens = 48
    config.eval.best_of = 10
    return config
