"""What the name of an algorithm promises: settings that would make it another one are refused."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Algorithm(Protocol):
    """The fields of `schema.AlgoConfig` that tell algorithms apart."""

    name: str
    aggregation: str
    norm_by_std: bool
    kl_coef: float
    clip_eps_low: float
    clip_eps_high: float


def require(is_ok: bool, message: str) -> None:
    """Raises a ValueError with the message unless all is well."""
    if not is_ok:
        raise ValueError(message)


def check_definition(algo: Algorithm) -> None:
    """Refuses what contradicts the definition of the algorithm that `algo.name` promises.

    Raises:
        ValueError: names the field and what to set.
    """
    require(
        not (algo.norm_by_std and algo.name in ("dr_grpo", "rloo")),
        f"algo.name={algo.name} never divides by the group's std: set algo.norm_by_std=false",
    )
    require(
        algo.name != "dr_grpo" or algo.aggregation.startswith("seq-mean-token-sum"),
        f"algo.name=dr_grpo with algo.aggregation={algo.aggregation!r}: it divides by lengths, "
        "which Dr.GRPO does not; set algo.aggregation=seq-mean-token-sum-norm",
    )
    require(
        algo.name != "gspo" or algo.aggregation == "seq-mean-token-mean",
        f"algo.name=gspo with algo.aggregation={algo.aggregation!r}: its loss is one number a "
        "sequence; set algo.aggregation=seq-mean-token-mean",
    )
    preset = f"recipes.set_algorithm(config, '{algo.name}') in a recipe sets the paper's numbers"
    is_even = algo.clip_eps_low == algo.clip_eps_high
    require(
        algo.name != "dapo" or not is_even or algo.kl_coef == 0,
        f"algo.name=dapo with algo.clip_eps_high={algo.clip_eps_high:g} as below and "
        f"algo.kl_coef={algo.kl_coef:g} is GRPO by another name; {preset}",
    )
    require(
        algo.name != "gspo" or max(algo.clip_eps_low, algo.clip_eps_high) < 0.1,
        f"algo.name=gspo with algo.clip_eps_low={algo.clip_eps_low:g}, algo.clip_eps_high="
        f"{algo.clip_eps_high:g}: its ratio is that of a whole sequence and never gets so far; "
        f"{preset}",
    )
