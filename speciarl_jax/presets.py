"""Settings that several recipes share: the algorithms with the numbers of their papers."""

from speciarl_jax.config import AlgoConfig, Config

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "dapo_dynamic", "gspo", "rloo")
Setting = float | bool | str  # value of a field of `algo`


def set_algorithm(config: Config, name: str) -> None:
    """Sets an algorithm with its paper's numbers, in place.

    DAPO's overlong buffer is the last quarter of ``rollout.max_completion_tokens`` (512 of the
    paper's 2048), and dynamic sampling generates three times ``train.prompts_per_step`` prompts at
    once (768 for 256), so set those first.

    Args:
        config: the recipe; clipping, KL, aggregation and normalisation are expected at their
            defaults, which are GRPO's.
        name: one of `ALGORITHMS`.

    Raises:
        ValueError: another name.

    Source: SpeciaRL's released scripts (GRPO, Dr.GRPO arXiv 2503.20783, DAPO arXiv 2503.14476).
    GSPO (arXiv 2507.18071): clip range of section 5.1, a mean over sequences (equation 5), no dual
    clip and no KL, as in verl's examples/gspo_trainer. RLOO (arXiv 2402.14740): no division by the
    std; the ratio is 1 in a first update, so PPO's clip only acts in later ones; it stays, and the
    KL in the loss, as in verl's examples/rloo_trainer (the paper subtracts KL from the reward).
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algo={name}: expected one of {', '.join(ALGORITHMS)}")
    for field, value in _preset(config, name).items():
        setattr(config.algo, field, value)


def _preset(config: Config, name: str) -> dict[str, Setting]:
    """The fields of `algo` in which an algorithm differs from the defaults, its name first."""
    fields: dict[str, Setting] = {"name": name.removesuffix("_dynamic")}
    if name == "dr_grpo":
        fields |= {"norm_by_std": False, "kl_coef": 0.0, "aggregation": "seq-mean-token-sum-norm"}
    elif name == "gspo":
        fields |= {"kl_coef": 0.0, "aggregation": "seq-mean-token-mean"}
        fields |= {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "clip_dual": 0.0}
    elif name == "rloo":
        fields |= {"norm_by_std": False}
    elif fields["name"] == "dapo":
        fields |= {"kl_coef": 0.0, "clip_eps_high": 0.28, "clip_dual": 10.0}
        fields |= {"overlong_buffer_tokens": config.rollout.max_completion_tokens // 4}
    if name == "dapo_dynamic":
        fields |= {"dynamic_sampling": True}
        fields |= {"generation_prompts": 3 * config.train.prompts_per_step}
    return fields


def change_of_algorithm(recipe: Config, config: Config, name: str) -> dict[str, Setting]:
    """What a recipe's `algo` needs to become another algorithm.

    Takes back what the preset of the recipe's own algorithm set, then applies the new one; what
    the recipe set by itself stays where the new preset does not speak of it.

    Args:
        recipe: as its file makes it.
        config: with the sizes of the run, from which presets derive theirs.
        name: one of `ALGORITHMS`.

    Returns:
        New value of each field of `algo` that changes.
    """
    algo = recipe.algo
    own = "dapo_dynamic" if algo.name == "dapo" and algo.dynamic_sampling else algo.name
    if own == name:
        return {}
    default = AlgoConfig()
    fields: dict[str, Setting] = {}
    if own in ALGORITHMS:
        preset = _preset(recipe, own)
        fields = {f: getattr(default, f) for f, v in preset.items() if getattr(algo, f) == v}
    fields |= _preset(config, name)
    return {field: value for field, value in fields.items() if getattr(algo, field) != value}
