r"""Warms up the small policy on the field guide: what `make tiny` runs.

    speciarl tiny init runs/tiny/init
    speciarl train --config=configs/tiny_sft.py --workdir=runs/tiny/sft
    speciarl tiny ship runs/tiny/sft --out=runs/tiny/first
    speciarl train --workdir=runs/tiny/sft2 \
        --config=configs/tiny_sft.py:model=runs/tiny/first,steps=1000,lr=1e-3,pictures=8,hard=0.4

Hardware: 2 CPU cores, about 35 minutes. Every weight is trained, the vision tower included.
Expected: species accuracy on easy images, asked for the exact name, above .9 in each domain.
The objective `sft` with `sft_target="answer"` and an adapter is the paper's SFT baseline.
"""

from speciarl_jax import config as schema

DOMAINS = ("birds", "flowers", "aircraft", "dogs")
IMAGES_PER_DOMAIN = 6000
# The pictures' seeds (7, then 8) are used for nothing else: neither training nor testing sees them.
DEFAULTS = {
    "model": "runs/tiny/init",
    "steps": "1800",
    "lr": "2e-3",
    "pictures": "7",
    "hard": "0.2",  # share of hard pictures: few at first, then as many as in the field guide
}


def get_config(arg=None):
    """The recipe; `model` is the directory with random weights."""
    values = schema.parse_recipe_arg(arg, DEFAULTS)
    config = schema.Config(name="tiny_sft")
    config.model.path = values["model"]
    config.model.train_base = True
    config.model.train_vision = True
    config.model.remat = "full"
    config.data.source = " + ".join(
        f"field_guide_{domain}:train={IMAGES_PER_DOMAIN},validation=0,test=0,"
        f"seed={values['pictures']},hard_frac={values['hard']},warmup=1"
        for domain in DOMAINS
    )
    # Four of five questions are plain and answered cautiously; one asks for the exact name.
    config.data.prompt = "field_guide,field_guide,field_guide,field_guide,field_guide_exact"
    config.data.eval_sources = tuple(
        f"field_guide_{domain}:validation=0,test=96" for domain in DOMAINS
    )
    config.data.cache_mb = 2048
    config.data.prompt_buckets = (48,)  # one shape, one compilation
    config.data.window_buckets = (6,)
    config.rollout.max_completion_tokens = 48
    config.rollout.compact = False
    config.algo.name = "sft"
    config.algo.kl_coef = 0.0
    config.algo.aggregation = "token-mean"
    config.optim.learning_rate = float(values["lr"])
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 200
    config.optim.beta2 = 0.98
    config.optim.weight_decay = 0.05
    config.train.num_steps = int(values["steps"])
    config.train.prompts_per_step = 64
    config.train.prompts_per_update = 64
    config.train.prompts_per_micro_batch = 64
    config.train.sft_target = "field_guide"
    config.train.logprob_chunk_tokens = 4096
    config.train.save_every = 200
    config.eval.max_completion_tokens = 48
    config.eval.score_base = False
    return config
