"""What recipes share: algorithms with the numbers of their papers, loading, arguments."""

import pathlib
import sys
import traceback
from collections.abc import Sequence

from speciarl_jax.config.dotted import USER_CODE_ERRORS
from speciarl_jax.config.ranges import check_fields, check_name
from speciarl_jax.config.schema import AlgoConfig, Config

_OVERRIDE = "--config."
_ALGORITHM = f"{_OVERRIDE}algo.name="
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


def load_recipe(path: str, overrides: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """Loads ``PATH.py[:ARGUMENT]`` and applies ``--config.a.b=value`` overrides.

    An override of ``algo.name`` brings the algorithm's preset, which comes between the recipe and
    the other overrides; a line on standard error says what it set.

    Returns:
        (config, folder of the recipe).

    Raises:
        ValueError: no such file, one that fails or has no get_config, an unknown field, or a value
            of another type.
    """
    names = [word for word in overrides if word.startswith(_ALGORITHM)]
    name = names[-1].removeprefix(_ALGORITHM) if names else ""
    if name in ALGORITHMS:
        others = [word for word in overrides if word not in names]
        fields = change_of_algorithm(_load(path, []), _load(path, others), name)
        config = _load(path, [*(f"--config.algo.{k}={v}" for k, v in fields.items()), *others])
        kept = {k: v for k, v in fields.items() if k != "name" and getattr(config.algo, k) == v}
        if kept:
            shown = ", ".join(f"{k}={v}" for k, v in kept.items())
            print(f"algo.name={name} sets in algo: {shown}", file=sys.stderr)
    else:
        config = _load(path, overrides)
    return config, pathlib.Path(path.partition(":")[0]).resolve().parent


def _load(path: str, overrides: Sequence[str]) -> Config:
    """The recipe with overrides, the last of a field wins."""
    from absl import flags
    from ml_collections import config_flags

    file, given = path.partition(":")[0], f"--config={path}"
    if not pathlib.Path(file).is_file():
        raise ValueError(f"{given}: no such recipe file")
    for word in overrides:
        check_name(Config(), word.removeprefix(_OVERRIDE).partition("=")[0])
    sys.modules.pop("config_config", None)  # else this recipe runs on the names of the last one
    values = flags.FlagValues()
    words = ["speciarl", given, *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False, sys_argv=words)
    try:
        values(words)
        config = values.config
    except flags.Error as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{' '.join([given, *overrides])}: {reason}") from error
    except USER_CODE_ERRORS as error:
        where = _line_of(error, file)
        if not where and "get_config" in str(error):
            raise ValueError(f"{file}: has no get_config(arg), which makes the recipe") from error
        place = f"{file}, line {where}" if where else " ".join([given, *overrides])
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise ValueError(f"{file}: get_config returned {kind}; expected speciarl_jax.config.Config")
    try:
        check_fields(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _line_of(error: BaseException, file: str) -> int:
    """The line of a recipe that an error comes from; 0 if it comes from elsewhere."""
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    recipe = pathlib.Path(file).resolve()
    lines = [line or 0 for name, line in places if pathlib.Path(name).resolve() == recipe]
    return lines[-1] if lines else 0


def neighbour(recipe: str, name: str, arg: str | None = None) -> Config:
    """Another recipe of the same folder, to change a few fields of.

    Args:
        recipe: the asking recipe's ``__file__``.
        name: the other's file name.
        arg: its argument, as after the colon of ``--config``.

    Raises:
        ValueError: see `load_recipe`.
    """
    place = pathlib.Path(recipe).with_name(name)
    return _load(f"{place}:{arg}" if arg else str(place), [])


def parse_recipe_arg(arg: str | None, allowed: dict[str, str]) -> dict[str, str]:
    """Parses the text after the colon of ``--config=recipe.py:reward=binary,seed=1``.

    Args:
        arg: ``key=value`` pairs separated by commas, or None.
        allowed: default for each key the recipe understands.

    Raises:
        ValueError: a key the recipe does not understand, or a part without ``=``.
    """
    values = dict(allowed)
    for part in filter(None, (arg or "").split(",")):
        key, _, value = part.partition("=")
        if key not in allowed or not value:
            known = ", ".join(f"{k}={v}" for k, v in allowed.items())
            raise ValueError(f"recipe argument {part!r}: expected key=value out of {known}")
        values[key] = value
    return values
