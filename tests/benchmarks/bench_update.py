"""The update against torch: one group's forward, backward and AdamW step on a LoRA adapter.

    python tests/benchmarks/bench_update.py [--shapes tiny middle] [--repeats N]

Prints one JSON object. Both sides run on one core in float32 from the same checkpoint, adapter,
tokens, advantages and image embeddings (vision is left out of both), without rematerialisation:

    ours    prompt once and its N = 8 completions on the shared-prefix tree, `update.update_step`
    peer    N full sequences [prompt, completion] through transformers (sdpa) with a peft adapter,
            the head on completion tokens only, torch's AdamW and gradient clipping

Sequences have equal lengths, so neither side pads. The first step's loss and gradient norm of the
two sides must agree, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import harness
import jax
import numpy as np
from random_policy import (
    MIDDLE,
    TINY,
    Shape,
    encode_prompts,
    load_peer,
    random_images,
    write_checkpoint,
)

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import LoraConfig, OptimConfig
from speciarl_jax.convert.adapter import save_peft
from speciarl_jax.convert.loading import load_policy
from speciarl_jax.data.prompts import EncodedPrompt
from speciarl_jax.learner.logprobs import LossConfig, TrainBatch, TreeBatch
from speciarl_jax.learner.optimizer import init_optimizer, make_optimizer
from speciarl_jax.learner.update import update_step
from speciarl_jax.policy import flops
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import split_policy

GROUP_SIZE = 8
LORA = LoraConfig(rank=16, alpha=16.0)  # as configs/cpu_smoke.py
OPTIM = OptimConfig()


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: a model, how many groups share a step, and how long its sequences are."""

    shape: Shape
    num_groups: int
    image_px: int
    text_tokens: int
    completion_tokens: int
    repeats: int


CASES = {
    "tiny": Case(TINY, 8, 112, 32, 48, 9),
    "middle": Case(MIDDLE, 1, 448, 44, 128, 3),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """What both sides train on.

    Attributes:
        prompts: P prompts of S tokens.
        images: [P, M, D] embeddings of their images.
        completions: [P, G, C].
        advantages: [P, G].
    """

    prompts: list[EncodedPrompt]
    images: np.ndarray
    completions: np.ndarray
    advantages: np.ndarray

    @property
    def weight(self) -> float:
        """Token-mean: the same weight for every completion token."""
        return 1.0 / self.completions.size


def make_data(case: Case, arch: Arch) -> Data:
    """Random prompts, completions and advantages."""
    rng = np.random.default_rng(2)
    sizes = [(case.image_px, case.image_px)] * case.num_groups
    prompts = encode_prompts(random_images(sizes), arch, case.text_tokens)
    merged = int((prompts[0].tokens == arch.image_token_id).sum())
    group = (case.num_groups, GROUP_SIZE)
    shape = (*group, case.completion_tokens)
    width = arch.text.hidden_size
    return Data(
        prompts,
        0.5 * rng.normal(size=(case.num_groups, merged, width)).astype(np.float32),
        rng.integers(10, arch.text.vocab_size, shape).astype(np.int32),
        rng.normal(size=group).astype(np.float32),
    )


def train_batch(data: Data, arch: Arch) -> TrainBatch:
    """The data as one micro-batch, leaves [1, P, ...]."""
    tokens = np.stack([prompt.tokens for prompt in data.prompts])
    lengths = np.full(len(tokens), tokens.shape[1], np.int32)
    is_image = tokens == arch.image_token_id
    tree = TreeBatch(
        prompt_tokens=tokens,
        prompt_lengths=lengths,
        positions=np.stack([prompt.positions for prompt in data.prompts]),
        next_position=lengths + np.array([p.delta for p in data.prompts], np.int32),
        image_rows=np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1).astype(np.int32),
        images=data.images,
        completion_tokens=data.completions,
    )
    batch = TrainBatch(
        tree=tree,
        weights=np.full(data.completions.shape, data.weight, np.float32),
        advantages=data.advantages,
    )
    return jax.tree.map(lambda x: x[None], batch)


def our_side(
    path: pathlib.Path, data: Data
) -> tuple[Callable[[], tuple[float, float]], pathlib.Path]:
    """(one step that returns loss and gradient norm, the adapter's directory in peft's format)."""
    policy = load_policy(path, Dtypes())
    add_lora(policy, LORA, seed=0)
    adapter = path.parent / "adapter"
    save_peft(policy, LORA, str(path), adapter)
    parts = split_policy(policy)
    optimizer = make_optimizer(OPTIM, num_updates=1)
    trained = [parts.trainable, init_optimizer(optimizer, parts.trainable)]
    batch = jax.device_put(train_batch(data, policy.arch))
    banned = jax.numpy.zeros(policy.arch.text.vocab_size, bool)

    def step() -> tuple[float, float]:
        trained[0], trained[1], stats = update_step(
            parts.graphdef,
            trained[0],
            parts.frozen,
            trained[1],
            batch,
            banned,
            optimizer,
            LossConfig(),
        )
        jax.block_until_ready(trained)
        return float(stats["loss"]), float(stats["grad_norm"])

    return step, adapter


def peer_sequences(model: Any, data: Data, arch: Arch) -> tuple[Any, Any]:
    """Embedded full sequences [P*G, S + C, D] and their M-RoPE ids [3, P*G, S + C]."""
    import torch

    embedding = model.get_input_embeddings()
    width = data.completions.shape[2]
    rows, ids = [], []
    for prompt, images, group in zip(data.prompts, data.images, data.completions, strict=True):
        head = embedding(torch.from_numpy(prompt.tokens).long())
        head[torch.from_numpy(prompt.tokens == arch.image_token_id)] = torch.from_numpy(images)
        own = len(prompt.tokens) + prompt.delta + np.arange(width)
        for completion in group:
            rows.append(torch.cat([head, embedding(torch.from_numpy(completion).long())]))
            ids.append(np.concatenate([prompt.positions, np.tile(own, (3, 1))], axis=1))
    return torch.stack(rows).detach(), torch.from_numpy(np.stack(ids, axis=1)).long()


def peer_side(
    path: pathlib.Path, adapter: pathlib.Path, data: Data, arch: Arch
) -> Callable[[], tuple[float, float]]:
    """One step in torch that returns loss and gradient norm."""
    import peft
    import torch

    wrapped = peft.PeftModel.from_pretrained(load_peer(path), adapter, is_trainable=True).train()
    params = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params,
        lr=OPTIM.learning_rate,
        betas=(OPTIM.beta1, OPTIM.beta2),
        weight_decay=OPTIM.weight_decay,
    )
    model = wrapped.base_model.model
    sequences, ids = peer_sequences(model, data, arch)
    width = data.completions.shape[2]
    tokens = torch.from_numpy(data.completions.reshape(-1, width)).long()
    scale = torch.from_numpy(data.advantages.reshape(-1, 1)) * data.weight
    first = sequences.shape[1] - width - 1  # the state that predicts completion token 0

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        text = model.model.language_model
        hidden = text(inputs_embeds=sequences, position_ids=ids, use_cache=False).last_hidden_state
        logprobs = torch.log_softmax(model.lm_head(hidden[:, first:-1]).float(), dim=-1)
        chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
        loss = -(scale * torch.exp(chosen - chosen.detach())).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, OPTIM.max_grad_norm)
        optimizer.step()
        return loss.item(), norm.item()

    return step


def adapter_params(arch: Arch) -> int:
    """Scalars of the adapter."""
    text = arch.text
    kv_width, inner = text.num_kv_heads * text.head_dim, text.intermediate_size
    sides = 2 * 2 * text.hidden_size + 2 * (text.hidden_size + kv_width)  # q, o; k, v
    sides += 3 * (text.hidden_size + inner)
    return LORA.rank * text.num_layers * sides


def count_flops(case: Case, arch: Arch, prompt_tokens: int) -> dict[str, float]:
    """GFLOP of one step: the tree (the head's recomputation included) and N full sequences."""
    lengths = np.full((case.num_groups, GROUP_SIZE), case.completion_tokens)
    no_images = np.zeros((0, 1), int)
    tree = flops.count_tokens(np.full(case.num_groups, prompt_tokens), lengths, no_images)
    whole = flops.count_tokens(
        np.full(lengths.size, prompt_tokens), lengths.reshape(-1, 1), no_images
    )
    training = flops.Training(adapter_params=adapter_params(arch))
    naive = flops.learning_flops(arch, whole, training)
    return {
        "ours": round(1e-9 * flops.update_hardware_flops(arch, tree, training), 1),
        "peer": round(1e-9 * (naive["forward"] + naive["backward"]), 1),
    }


def check_agreement(ours: tuple[float, float], peer: tuple[float, float]) -> dict[str, float]:
    """Relative differences of loss and gradient norm at the first step.

    Raises:
        RuntimeError: the two sides do not compute the same.
    """
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, peer, strict=True)]
    if max(gaps) > 1e-4:
        raise RuntimeError(f"(loss, gradient norm): ours {ours}, peer {peer}; expected within 1e-4")
    return {"loss": float(f"{gaps[0]:.1e}"), "grad_norm": float(f"{gaps[1]:.1e}")}


def run_case(case: Case, repeats: int) -> dict[str, Any]:
    """Times both sides of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        arch = write_checkpoint(case.shape, path)
        data = make_data(case, arch)
        ours, adapter = our_side(path, data)
        peer = peer_side(path, adapter, data, arch)
        gaps = check_agreement(ours(), peer())
    seconds = harness.interleaved({"ours": ours, "peer": peer}, repeats)
    prompt_tokens = len(data.prompts[0].tokens)
    gflop = count_flops(case, arch, prompt_tokens)
    rate = harness.gemm_gflops()
    floors = {side: gflop[side] / max(rate.values()) for side in gflop}
    return {
        "groups": case.num_groups,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": case.completion_tokens,
        "relative_difference": gaps,
        **{side: harness.summary(times) for side, times in seconds.items()},
        "speedup": harness.ratio(seconds["peer"], seconds["ours"]),
        "gflop": gflop,
        "gemm_gflop_per_s": rate,
        "above_floor": {
            side: round(float(np.median(seconds[side])) / floors[side], 2) for side in floors
        },
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=0, help="0: 9 for tiny, 3 for middle")
    args = parser.parse_args()
    harness.use_one_core()
    cases = {
        name: run_case(CASES[name], args.repeats or CASES[name].repeats) for name in args.shapes
    }
    result = {"benchmark": "update", "group_size": GROUP_SIZE, "lora_rank": LORA.rank, **cases}
    print(json.dumps(result | harness.provenance(), indent=1))


if __name__ == "__main__":
    main()
