"""Recipes: their schema and what several of them share.

``from speciarl_jax import config as schema`` in a recipe gives every section's class.
"""

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.config.recipes import load_recipe, parse_recipe_arg
from speciarl_jax.config.schema import (
    AGGREGATIONS,
    OBJECTIVES,
    REWARDS,
    AlgoConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    TrainConfig,
)

__all__ = [
    "AGGREGATIONS",
    "OBJECTIVES",
    "REWARDS",
    "AlgoConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "JudgeConfig",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RolloutConfig",
    "TrainConfig",
    "load_recipe",
    "parse_recipe_arg",
]
