"""The host side of a rollout: lays rows out, looks up between chunks, hands finished answers out.

One batch goes encode -> prefill -> fork -> decode in chunks. A chunk ends at its length, or as soon
as the unfinished rows fit the next smaller batch, into which they are then moved. What a row
samples depends only on (seed, step, prompt, sample), not on its neighbours, the mesh or the split.

On a mesh of several processes (``rollout.scope=job``) every program is one of all of them. Each
process feeds its own prompts, sees its own rows and hands them out; after each chunk they agree on
the rows of the fullest shard of all, from which the sizes of what is launched next follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from speciarl_jax.arch import TextArch
from speciarl_jax.config.schema import RolloutConfig
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.devices import processes
from speciarl_jax.devices.layout import AnyArray, Params, Tree, own_prompts, place_prompts
from speciarl_jax.devices.mesh import own_replicas
from speciarl_jax.devices.processes import Poll
from speciarl_jax.policy.model import Policy
from speciarl_jax.policy.vocabulary import Vocabulary
from speciarl_jax.rollout import decode, layout, memory, order, spill
from speciarl_jax.rollout.decode import DecodeState, PromptCache, RowMap, merge_text
from speciarl_jax.rollout.finished import FinishedRow, not_finite, stop_string_length
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.timing import num_compiled


@dataclasses.dataclass
class RolloutStats:
    """Work done and wasted by one `generate`.

    Attributes:
        slot_steps: rows decoded, summed over steps and shards.
        live_steps: those that produced a token of an answer.
        decode_steps: steps of the decode loop.
        waves: parts that the batch was cut into.
        parked: halves that waited on the host for room.
        recompilations: programs that had to be compiled on the way.
    """

    slot_steps: int = 0
    live_steps: int = 0
    decode_steps: int = 0
    waves: int = 0
    parked: int = 0
    recompilations: int = 0

    @property
    def slot_utilization(self) -> float:
        """Share of decoded slot-steps that produced a token of an answer."""
        return self.live_steps / self.slot_steps if self.slot_steps else 1.0


@dataclasses.dataclass
class Wave:
    """Rows under way: device state and the host's view of its own.

    Attributes:
        most_live: unfinished rows of the fullest shard of all processes that sample together.
        parked: rows that wait on the host.
    """

    prompts: layout.PromptArrays
    cache: PromptCache
    rows: layout.Rows
    state: DecodeState
    step: int = 0
    most_live: int = 0
    parked: list[spill.Parked] = dataclasses.field(default_factory=list)


class RolloutEngine:
    """Samples groups of answers. Holds no parameters; they come with each call."""

    def __init__(
        self,
        graphdef: nnx.GraphDef[Policy],
        config: RolloutConfig,
        vocabulary: Vocabulary,
        mesh: Mesh | None = None,
    ) -> None:
        """Keeps the static parts; `mesh` is `devices.mesh.sampling_mesh`, None for one device."""
        self.graphdef = graphdef
        self.config = config
        self.vocabulary = vocabulary
        self.placement = Placement.of_run(mesh, config.early_exit)
        self.is_job = mesh is not None and mesh.is_multi_process
        self.own_shards = own_replicas(mesh) if mesh is not None else 1
        self.is_int8 = config.kv_cache_dtype == "int8"
        self.has_few_sizes = self.placement.has_few_sizes
        self.columns = layout.column_sizes(
            config.chunk_tokens, config.max_completion_tokens, config.compact, self.has_few_sizes
        )
        self.stats = RolloutStats()
        self.rows_that_fit: Callable[[int], int] = lambda columns: 0  # set by `plan_waves`
        self._text: tuple[TextArch, int] | None = None  # and bytes of an activation

    @property
    def agree(self) -> Poll:
        """What the processes that sample together look up with between two pieces of work."""
        return processes.together if self.is_job else processes.alone

    def _put(self, tree: Tree) -> Tree:
        """The host's arrays of own prompts or rows, as a program takes them."""
        mesh = self.placement.mesh
        return place_prompts(tree, mesh) if mesh is not None and self.is_job else tree

    def generate(
        self,
        states: tuple[Params, ...],
        batch: PromptBatch,
        image_embeds: Array,
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
        step: int,
        poll: Poll | None = None,
    ) -> Iterator[list[FinishedRow]]:
        """Yields answers as they finish, each (prompt, sample) of real prompts once.

        There is a list after every chunk of decoding, empty where no row has finished, so that
        callers can look after other things meanwhile.

        Args:
            states: the parts that `graphdef` merges with (trainable, frozen).
            batch: prompts, as many as the mesh's shards of this process or a multiple, padded alike
                in all that sample together; padding gets no rows.
            image_embeds: [I*M, D] from `policy.model.encode_images`, of all of them.
            group_size: answers per prompt.
            sampling: how tokens are chosen.
            seed, step: of the run; both are folded into the randomness.
            poll: called after each chunk with the rows that are left, for the most there are
                anywhere; `agree`, or what calls it and looks after more. May raise.

        Raises:
            ValueError: the prompts do not divide over the shards, or one alone does not fit
                ``rollout.max_cache_mb``.
            TrainingStopped: the policy's logits are not numbers.
        """
        self.stats = RolloutStats()
        compiled = num_compiled()
        poll = poll or self.agree
        table_rows = len(image_embeds) * self.own_shards // self.placement.num_shards
        for prompts in self.plan_waves(states, batch, table_rows, group_size, sampling):
            self.stats.waves += 1
            wave = self.start(states, prompts, image_embeds, group_size, seed, step)
            for finished in self._decode_all(states, wave, group_size, sampling):
                self.stats.recompilations += num_compiled() - compiled
                error = not_finite(finished)
                yield finished if error is None else []
                (wave.most_live,) = poll(wave.rows.most_live(), error=error)
                compiled = num_compiled()  # the caller may have compiled something of its own

    def plan_waves(
        self,
        states: tuple[Params, ...],
        batch: PromptBatch,
        table_rows: int,
        group_size: int,
        sampling: Sampling,
    ) -> list[layout.PromptArrays]:
        """The parts of a batch that are sampled one after the other; see `generate`.

        `table_rows` are those of the images of this process. A part that is padding here takes
        place nevertheless if it has a prompt in another process.
        """
        if self._text is None:
            text = merge_text(self.graphdef, *states)
            self._text = (text.arch, np.dtype(text.dtype).itemsize)
        arch, compute_bytes = self._text
        mesh = self.placement.mesh
        shape = memory.RolloutShape(
            config=self.config,
            num_prompts=batch.num_prompts,
            group_size=group_size,
            prompt_tokens=batch.tokens.shape[1],
            compute_bytes=compute_bytes,
            num_shards=self.own_shards,
            tensor=mesh.shape["tensor"] if mesh else 1,
            truncates=sampling.truncates,
            is_unrolled=self.placement.is_unrolled,
            has_few_sizes=self.has_few_sizes,
        )
        width = memory.prompts_per_wave(arch, shape)
        wave = dataclasses.replace(shape, num_prompts=width)
        self.rows_that_fit = functools.partial(memory.rows_that_fit, arch, wave)
        waves = layout.waves(batch, table_rows, self.own_shards, width)
        are_used = self.agree(*(int(wave.has_prompts) for wave in waves))
        return [wave for wave, is_used in zip(waves, are_used, strict=True) if is_used]

    def start(
        self,
        states: tuple[Params, ...],
        prompts: layout.PromptArrays,
        image_embeds: Array,
        group_size: int,
        seed: int,
        step: int,
    ) -> Wave:
        """Prefills a wave and forks its rows."""
        arrays = (prompts.tokens, prompts.positions, prompts.lengths)
        cache = decode.prefill(
            self.graphdef,
            states,
            *self._put((*arrays, prompts.position_deltas, prompts.image_rows)),
            image_embeds,
            is_int8=self.is_int8,
            placement=self.placement,
        )
        rows = layout.Rows.of_prompts(prompts, self.own_shards, group_size)
        index = prompts.global_index[rows.flat_prompt(prompts.num_prompts)]
        index, sample = self._put((index, rows.sample.reshape(-1)))
        keys = decode.keys_of_rows(seed, np.int32(step), index, sample, self.placement)
        row_map = self.row_map(rows, prompts.num_prompts, group_size)
        is_padding = self._put(rows.is_free.reshape(-1))
        state = decode.start(cache, row_map, keys, is_padding, self.columns[0], self.placement)
        return Wave(prompts, cache, rows, state)

    def row_map(self, rows: layout.Rows, num_prompts: int, slots: int) -> RowMap[AnyArray]:
        """`Rows.row_map` as a program takes it."""
        return self._put(rows.row_map(num_prompts, slots))

    def _decode_all(
        self,
        states: tuple[Params, ...],
        wave: Wave,
        slots: int,
        sampling: Sampling,
    ) -> Iterator[list[FinishedRow]]:
        limit, full = self.config.max_completion_tokens, wave.rows.per_shard
        row_map = self.row_map(wave.rows, wave.prompts.num_prompts, slots)
        while True:
            columns = wave.state.num_columns
            until = min(wave.step + self.config.chunk_tokens, columns)
            smaller = self._next_rows(wave, full) if self.config.compact else 0
            self.advance(states, wave, row_map, until, smaller, sampling)
            yield self._take_finished(wave, wave.step >= limit)
            has_moved = False
            if wave.most_live == 0:  # `generate` has agreed on it meanwhile
                if not spill.resume(wave):
                    return
                has_moved = True
            if self.config.compact:
                has_moved |= self._shrink(wave, full)
            if wave.step == (columns := wave.state.num_columns):
                wider = self.columns[self.columns.index(columns) + 1]
                has_moved |= self.make_room(wave, wider, full)
                wave.state = decode.widen(wave.state, wider, self.placement)
            if has_moved:
                row_map = self.row_map(wave.rows, wave.prompts.num_prompts, slots)

    def advance(
        self,
        states: tuple[Params, ...],
        wave: Wave,
        row_map: RowMap[AnyArray],
        until: int,
        enough: int,
        sampling: Sampling,
    ) -> None:
        """Decodes to step `until`, or until `enough` rows of a shard are left; counts the work."""
        wave.state = order.decode_chunk(
            self.graphdef,
            states,
            wave.cache,
            row_map,
            wave.state,
            self._put(wave.rows.is_free.reshape(-1)),
            self.vocabulary.stop_ids,
            self.vocabulary.banned,
            np.int32(until),
            np.int32(enough),
            sampling,
            self.placement,
        )
        previous, wave.step = wave.step, int(wave.state.step)
        self.stats.decode_steps += wave.step - previous
        self.stats.slot_steps += wave.rows.is_free.size * (wave.step - previous)

    def make_room(self, wave: Wave, columns: int, full: int) -> bool:
        """Parks rows until the others may have so many columns; whether it had to."""
        has_parked = False
        while wave.rows.per_shard > self.rows_that_fit(columns):
            spill.park_half(wave, lambda half: self._shrink(half, full))
            self.stats.parked += 1
            has_parked = True
        return has_parked

    def _next_rows(self, wave: Wave, full: int) -> int:
        return layout.next_rows(wave.rows.per_shard, full, self.has_few_sizes)

    def _shrink(self, wave: Wave, full: int) -> bool:
        """Moves live rows to the smallest batch that holds them, size by size."""
        has_shrunk = False
        while wave.most_live <= (smaller := self._next_rows(wave, full)):
            self.shrink(wave, smaller)
            has_shrunk = True
        return has_shrunk

    def shrink(self, wave: Wave, size: int) -> None:
        """Moves live rows to a batch of `size` a shard."""
        wave.rows, keep = wave.rows.shrunk(size)
        wave.state = decode.shrink(wave.state, self._put(keep), self.placement)

    def _take_finished(self, wave: Wave, is_last: bool) -> list[FinishedRow]:
        """Rows that are complete now and were not before; frees them."""
        was_free, state = wave.rows.is_free.reshape(-1), wave.state
        is_stopped, lengths = jax.device_get(
            (own_prompts(state.is_done), own_prompts(state.lengths))
        )
        stops = self.config.stop_strings
        if not (stops or is_last or (is_stopped & ~was_free).any()):
            return []
        arrays = (own_prompts(state.completion_tokens), own_prompts(state.logprobs))
        tokens, logprobs = jax.device_get(arrays)
        origin = wave.prompts.origin[wave.rows.flat_prompt(wave.prompts.num_prompts)]
        sample = wave.rows.sample.reshape(-1)
        is_done, finished = is_stopped.copy(), []
        for row in np.flatnonzero(~was_free):
            sampled = tokens[row, : lengths[row]]
            cut = stop_string_length(sampled, stops, self.vocabulary.decode)
            is_done[row] |= cut is not None or is_last
            if is_done[row]:
                finished.append(
                    FinishedRow(
                        prompt=int(origin[row]),
                        sample=int(sample[row]),
                        completion_tokens=sampled[:cut].copy(),
                        logprobs=logprobs[row, : len(sampled[:cut])].copy(),
                        is_truncated=cut is None and not is_stopped[row],
                    )
                )
        wave.rows = wave.rows.without(is_done)
        self.stats.live_steps += sum(len(row.completion_tokens) for row in finished)
        return finished
