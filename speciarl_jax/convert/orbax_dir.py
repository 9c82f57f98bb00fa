"""A converted model: the checkpoint's side files, and its parameters as an Orbax tree.

Orbax arrays restore straight to any sharding and each host reads its own part only, which Hugging
Face files do not give. Tensors are stored transposed already, and stacked over layers.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import PyTree

from speciarl_jax.arch import Arch
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import Policy, abstract_policy

PARAMS_DIR = "params"


def is_converted(path: str | pathlib.Path) -> bool:
    """Whether `path` was written by `speciarl convert`."""
    return (pathlib.Path(path) / PARAMS_DIR).is_dir()


def stored_dtype(directory: str | pathlib.Path) -> str:
    """Dtype of the token embedding of a converted model, by name."""
    tree = _stored_tree(pathlib.Path(directory).resolve() / PARAMS_DIR)
    return str(np.dtype(tree["text"]["embedding"].dtype))


def save_params(policy: Policy, directory: str | pathlib.Path) -> None:
    """Writes the parameters of a policy without adapter under ``directory/params``.

    Raises:
        ValueError: there are parameters already.
    """
    target = pathlib.Path(directory).resolve() / PARAMS_DIR
    if target.exists():
        raise ValueError(f"{target}: exists already; give an empty directory")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, nnx.to_pure_dict(nnx.state(policy)))


def load_params(
    directory: str | pathlib.Path, dtypes: Dtypes, shardings: nnx.State[str, object] | None = None
) -> Policy:
    """Reads what `save_params` wrote; ``directory/config.json`` gives the architecture.

    Arguments are those of `convert.loading.load_policy`; Orbax casts to `dtypes.param`.

    Raises:
        ValueError: the parameters do not fit config.json; the message names them.
    """
    directory = pathlib.Path(directory).resolve()
    policy = abstract_policy(Arch.from_dir(directory), dtypes)
    state = nnx.to_pure_dict(nnx.state(policy))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = nnx.to_pure_dict(shardings) if shardings else jax.tree.map(lambda _: here, state)
    target = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, places)
    stored = _shapes(_stored_tree(directory / PARAMS_DIR))
    wanted = _shapes(target)
    problems = [
        f"{name}: stored {stored.get(name, 'not at all')}, config.json asks for "
        f"{wanted.get(name, 'none')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"{directory}: parameters do not fit config.json:\n  {listing}")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(directory / PARAMS_DIR, target)
    full = nnx.state(policy)
    nnx.replace_by_pure_dict(full, restored)
    nnx.update(policy, full)
    return policy


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _stored_tree(path: pathlib.Path) -> PyTree:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(path).item_metadata.tree
