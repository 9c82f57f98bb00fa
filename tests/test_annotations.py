"""The import hooks of conftest.py are on: annotations of the package are checked when it runs."""

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

from speciarl_jax.files import read_json
from speciarl_jax.objective.loss import k3_kl
from speciarl_jax.objective.reward import bar
from speciarl_jax.policy.attention import causal_mask


def test_a_wrong_rank_is_refused():
    with pytest.raises(TypeCheckError, match="lengths"):
        causal_mask(jnp.zeros((2, 2), jnp.int32), 3)


def test_dimensions_of_two_arguments_must_agree():
    with pytest.raises(TypeCheckError, match="ref_logprobs"):
        k3_kl(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def test_an_int_may_stand_for_a_float_but_no_text():
    codes = jnp.zeros((1, 2), jnp.int32).__array__()
    bar(codes, 1)
    with pytest.raises(TypeCheckError, match="bar_support"):
        bar(codes, "1")


def test_a_file_that_names_no_dimensions_is_checked_too():
    with pytest.raises(BeartypeCallHintParamViolation, match="path"):
        read_json(3)
