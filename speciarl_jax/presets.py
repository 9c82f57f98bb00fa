"""Settings that several recipes share: the paper's three optimisers."""

from speciarl_jax.config import Config

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "dapo_dynamic")


def set_algorithm(config: Config, name: str) -> None:
    """Sets GRPO, Dr.GRPO or DAPO with the paper's numbers, in place.

    DAPO's overlong buffer is the last quarter of ``rollout.max_completion_tokens`` (512 of the
    paper's 2048), and dynamic sampling generates three times ``train.prompts_per_step`` prompts at
    once (768 for 256), so set those first.

    Args:
        config: the recipe; clipping, KL, aggregation and normalisation are expected at their
            defaults, which are GRPO's.
        name: one of `ALGORITHMS`.

    Raises:
        ValueError: another name.

    Source: SpeciaRL's released scripts; Dr.GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476).
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algo={name}: expected one of {', '.join(ALGORITHMS)}")
    algo = config.algo
    algo.name = name.removesuffix("_dynamic")
    if name == "dr_grpo":
        algo.norm_by_std = False
        algo.kl_coef = 0.0
        algo.aggregation = "seq-mean-token-sum-norm"
    elif algo.name == "dapo":
        algo.kl_coef = 0.0
        algo.clip_eps_high, algo.clip_dual = 0.28, 10.0
        algo.overlong_buffer_tokens = config.rollout.max_completion_tokens // 4
    if name == "dapo_dynamic":
        algo.dynamic_sampling = True
        algo.generation_prompts = 3 * config.train.prompts_per_step
