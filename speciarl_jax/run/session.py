"""What a run, an evaluation or a sampling session opens once: model, tokenizer, engine."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from jaxtyping import Array

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config
from speciarl_jax.convert.adapter import load_peft
from speciarl_jax.convert.loading import load_policy, resolve_checkpoint
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.prompts import PromptBuilder
from speciarl_jax.data.recipe import make_builder
from speciarl_jax.devices import layout, processes
from speciarl_jax.devices.layout import AnyArray, Params
from speciarl_jax.devices.mesh import (
    check_mesh,
    choose_mesh,
    make_mesh,
    num_replicas,
    sampling_mesh,
    sharing,
)
from speciarl_jax.devices.processes import Poll
from speciarl_jax.files import FETCH_MODEL, read_json
from speciarl_jax.learner import batches
from speciarl_jax.learner.opening import model_dtypes, open_optim, open_parts, with_adapter
from speciarl_jax.policy.model import (
    PolicyParts,
    abstract_policy,
    count_parameters,
    encode_images,
)
from speciarl_jax.policy.vocabulary import Vocabulary, make_vocabulary
from speciarl_jax.rollout.encode import encode_by_size
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.run.state import TrainState
from speciarl_jax.types import JsonObject

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

_CACHED_COMPILE_S = 0.2  # programs that compile faster are not worth a file


@dataclasses.dataclass
class Session:
    """A loaded policy and what is needed to talk to it.

    Attributes:
        model_dir: local directory of the base model.
        vocabulary: stop ids, banned ids, detokenizer.
        builder: examples to prompts.
        parts: the policy taken apart; `trainable` is the starting point of training.
        mesh: devices of the job; parameters lie on it as `speciarl_jax.devices.layout` says.
        sampling_mesh: the part of it that one rollout runs on: that of this process, or the whole.
    """

    config: Config
    model_dir: pathlib.Path
    arch: Arch
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    builder: PromptBuilder
    parts: PolicyParts
    engine: RolloutEngine
    mesh: Mesh
    sampling_mesh: Mesh

    @property
    def agree(self) -> Poll:
        """What the processes that sample together look up with between two pieces of work."""
        return self.engine.agree

    def sampling_states(self, trainable: Params) -> tuple[Params, Params]:
        """(trainable, frozen) as encoding and sampling take them: nothing is copied."""
        states = (trainable, self.parts.frozen)
        return states if self.engine.is_job else layout.local_view(states, self.sampling_mesh)

    def pad_alike(self, batch: PromptBatch) -> PromptBatch:
        """A batch in the shapes of all processes that sample together, ready to be encoded."""
        return self.agree_shapes(batch, None)[0] if self.engine.is_job else batch

    def agree_shapes(
        self, batch: PromptBatch, image_embeds: AnyArray | None
    ) -> tuple[PromptBatch, AnyArray | None]:
        """Prompts, images and their embeddings padded alike in all processes of the job."""
        shape = batches.prompt_shape(batch)
        length, slots, patches = processes.largest(*shape)
        if (length, slots, patches) == shape:
            return batch, image_embeds
        return batches.join_batches(
            [(batch, image_embeds)],
            np.arange(batch.num_prompts),
            self.arch.vision.merge_unit,
            int(self.vocabulary.stop_ids[0]),
            (length, slots, patches),
        )

    def encode(self, states: tuple[Params, ...], batch: PromptBatch) -> Array:
        """Image embeddings [I*M, D] of all that sample together; `states` are `sampling_states`.

        The batch is this process's, padded alike; see `pad_alike`.
        """
        vision, mesh = batch.vision, self.sampling_mesh
        if mesh.size == 1:
            unit, buckets = self.arch.vision.window_patches, self.config.data.window_buckets
            parts = (self.parts.graphdef, states, vision, unit, buckets)
            return encode_by_size(*parts, mesh=mesh)
        num_parts = num_replicas(mesh) // self.engine.own_shards
        place = layout.image_sharding(mesh, len(vision.patches) * num_parts)
        images = layout.place_own((vision.patches, vision.positions, vision.mask), place)
        table: Array = encode_images(self.parts.graphdef, states, *images, mesh)
        if not self.engine.is_job:
            return table
        by_prompt: Array = jax.device_put(table, layout.prompt_sharding(mesh))
        return by_prompt


def enable_compile_cache(directory: str) -> None:
    """Keeps compiled programs in a folder (``~``, ``gs://``), so that the next process loads them.

    "" leaves jax as it is, and a cache that the user has set through jax
    (``JAX_COMPILATION_CACHE_DIR``) stays. Who can write there can run code in later processes.
    """
    if not directory or jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_COMPILE_S)
    compilation_cache.reset_cache()  # else a program compiled before now has settled it: no cache


def open_session(
    config: Config,
    recipe_dir: pathlib.Path | None = None,
    adapter_dir: pathlib.Path | None = None,
) -> Session:
    """Loads tokenizer and weights, adds the adapter, prepares prompts and sampling.

    Args:
        config: a validated recipe; its model ``tiny`` is the small policy inside the package.
        recipe_dir: folder of the recipe, where its prompt files are looked for first.
        adapter_dir: a PEFT adapter instead of a fresh one; it decides ``config.lora``.

    Raises:
        ValueError: no such model, or a checkpoint, adapter, tokenizer or prompt that does not fit.
    """
    path = config.model.path
    model_dir = shipped_tiny_dir() if path == "tiny" else resolve_checkpoint(path)
    arch, tokenizer = Arch.from_dir(model_dir), load_tokenizer(model_dir)
    dtypes, mesh = model_dtypes(config.model), open_mesh(config, arch)
    # The weights go to their places on the mesh as they are read.
    places = layout.param_shardings(nnx.state(abstract_policy(arch, dtypes)), mesh)
    policy = load_policy(model_dir, dtypes, places)
    if adapter_dir is None:
        policy = with_adapter(config, policy)
    else:
        config.lora = load_peft(adapter_dir, policy)
    # Everything that talks to the policy.
    vocabulary = make_vocabulary(tokenizer, arch, read_stop_ids(tokenizer, model_dir))
    parts = open_parts(config, policy, mesh)
    builder = make_builder(config.data, tokenizer, arch, model_dir, config.seed, recipe_dir)
    own = sampling_mesh(mesh, config.rollout.scope)
    engine = RolloutEngine(parts.graphdef, config.rollout, vocabulary, own)
    return Session(
        config, model_dir, arch, tokenizer, vocabulary, builder, parts, engine, mesh, own
    )


def open_mesh(config: Config, arch: Arch) -> Mesh:
    """The job's devices, cut as ``config.mesh`` says or, with ``mesh.auto``, as the model needs.

    Raises:
        ValueError: see `devices.mesh`, where the mesh is made, checked and chosen; or the batch
            sizes do not divide over the replicas.
    """
    shape = config.mesh
    if shape.auto:
        size = jnp.dtype(config.model.param_dtype).itemsize
        text = nnx.state(abstract_policy(arch, model_dtypes(config.model)).text)
        stats = jax.local_devices()[0].memory_stats()
        memory = stats.get("bytes_limit") if stats else None
        devices, own = jax.device_count(), jax.local_device_count()
        shape, reason = choose_mesh(arch, count_parameters(text) * size, devices, own, memory)
        print(f"mesh.auto: {reason}", file=sys.stderr)  # stdout may be one JSON object
    mesh = make_mesh(shape)
    check_mesh(mesh, arch)
    processes.share_prompts(sharing(mesh))
    batch, replicas = config.train.prompts_per_update, num_replicas(mesh)
    if batch % replicas:
        raise ValueError(
            f"train.prompts_per_update={batch} is not a multiple of {replicas} replicas "
            f"(mesh data={mesh.shape['data']} fsdp={mesh.shape['fsdp']}); change one of them"
        )
    return mesh


def initial_state(
    session: Session, optimizer: optax.GradientTransformation, position: JsonObject
) -> TrainState:
    """Step 0, or what a checkpoint is restored into; `position` is the data loader's."""
    trainable = session.parts.trainable
    return TrainState(trainable, open_optim(optimizer, trainable, session.mesh), 0, position)


def load_tokenizer(model_dir: pathlib.Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        ValueError: the directory holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_dir}: no usable tokenizer ({error})") from error


def read_stop_ids(tokenizer: PreTrainedTokenizerBase, model_dir: pathlib.Path) -> set[int]:
    """Ids that end a completion: ``generation_config.json``, else the tokenizer's own."""
    file = model_dir / "generation_config.json"
    stop: int | list[int] | None = None
    if file.is_file():
        stop = read_json(file, FETCH_MODEL).get("eos_token_id")
    if stop is None:
        stop = tokenizer.eos_token_id
    if stop is None:
        return set()
    return {int(token) for token in (stop if isinstance(stop, list) else [stop])}
