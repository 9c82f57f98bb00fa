"""SpeciaRL end to end on two CPU cores: the small policy learns to be specific on birds.

    make smoke                      (or: speciarl train --config=configs/cpu_smoke.py --workdir=DIR)

Hardware: 2 cores, 8 GB; about 4 minutes after installation. Trained on birds only, scored on birds
(in domain) and on flowers, aircraft and dogs (out of domain). Expected out of domain: HM up by at
least .18, correctness down by at most .05 (docs/results.md).
Arguments: reward=dynamic|single|binary|scale1|scale2|scale3, n=10, seed=0 (of the run and of its
pictures), steps=100, support=1 (siblings that the bar needs; below 1 a share of n), updates=2 (of a
step's rollouts), algo=grpo|dr_grpo|dapo|dapo_dynamic|gspo|rloo.
"""

from speciarl_jax import config as schema
from speciarl_jax.config import recipes

DOMAINS = ("birds", "flowers", "aircraft", "dogs")
DEFAULTS = {
    "reward": "dynamic",
    "algo": "grpo",
    "n": "10",
    "seed": "0",
    "steps": "100",
    "support": "1",
    "updates": "2",
}
PROMPTS = 16
FIRST_PICTURES = 100  # the warm-up has seen the pictures of seeds 7 and 8


def get_config(arg=None):
    """The recipe; `arg` is ``key=value,...`` out of `DEFAULTS`."""
    values = schema.parse_recipe_arg(arg, DEFAULTS)
    config = schema.Config(name="cpu_smoke", seed=int(values["seed"]))
    config.model.path = "tiny"
    config.lora.rank = 16
    config.lora.alpha = 16.0
    pictures = f"seed={FIRST_PICTURES + config.seed}"
    config.data.source = f"field_guide_birds:{pictures}"
    config.data.eval_sources = tuple(f"field_guide_{domain}:{pictures}" for domain in DOMAINS)
    config.data.num_validation = 40
    config.data.prompt = "field_guide"
    config.data.prompt_buckets = (48,)  # one shape, one compilation
    config.data.window_buckets = (6,)
    config.rollout.group_size = int(values["n"])
    config.rollout.max_completion_tokens = 48
    config.rollout.chunk_tokens = 12
    config.rollout.compact = False
    config.train.prompts_per_step = PROMPTS
    recipes.set_algorithm(config, values["algo"])
    config.algo.reward = values["reward"]
    config.algo.bar_support = float(values["support"])
    config.optim.learning_rate = 3e-4
    config.train.num_steps = int(values["steps"])
    config.train.prompts_per_update = PROMPTS // int(values["updates"])
    config.train.prompts_per_micro_batch = config.train.prompts_per_update
    config.train.logprob_chunk_tokens = 4096
    config.train.save_every = 20
    config.train.table_every = 20
    config.train.eval_every = 5
    config.eval.max_completion_tokens = 48
    config.eval.policy_samples = 2
    return config
