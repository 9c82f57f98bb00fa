"""FLOPs by hand, and against XLA's count of two layers written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.arch import Arch, TextArch, VisionArch
from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.policy import flops
from speciarl_jax.policy.attention import attend, attend_shared, causal_mask
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import abstract_policy, count_parameters, split_policy
from speciarl_jax.policy.rope import text_angles

PROMPT, GROUP, WIDTH = 32, 4, 16  # S, G, C of the compiled tree


def small_arch():
    text = TextArch(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4,
        num_kv_heads=2, mrope_section=(8, 12, 12),
    )  # fmt: skip
    vision = VisionArch(
        depth=3, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=256,
        full_attention_blocks=(1,),
    )  # fmt: skip
    return Arch(vision=vision, text=text)


def test_counts_by_hand():
    counts = flops.count_tokens(
        np.array([3, 2]), np.array([[2, 1], [1, 0]]), np.array([[4, 4], [2, 0]])
    )
    assert counts == flops.Counts(
        prompt_tokens=5,
        completion_tokens=4,
        prompt_pairs=6 + 3,
        completion_pairs=(2 * 3 + 3) + (3 + 1) + (2 + 1) + 0,
        patches=10,
        window_pairs=16 + 16 + 4,
        image_pairs=64 + 4,
    )
    assert (counts + counts).completion_pairs == 32


def test_text_by_hand():
    """One token through 2 layers of width 256: q, o 256x256, k, v 256x128, MLP 3 x 256x512."""
    text = small_arch().text
    weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert flops.linear_flops(text, 1, adapter_params=10) == 2 * (weights + 10)
    assert flops.attention_flops(text, 1) == 2 * 2 * 2 * 256  # layers, two products, multiply-add
    assert flops.head_flops(text, 3) == 2 * 3 * 256 * 512


def test_vision_by_hand():
    """8 patches in two windows of 4, one of three blocks with full attention."""
    counts = flops.Counts(patches=8, window_pairs=32, image_pairs=64)
    patch_dim = 3 * 2 * 14 * 14
    linear = 8 * (patch_dim * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 96))
    merger = 2 * (256 * 256 + 256 * 256)
    attention = 4 * 64 * (1 * 64 + 2 * 32)
    assert flops.vision_flops(small_arch().vision, counts) == 2 * (linear + merger) + attention


def test_seven_billion_is_about_six_flops_per_weight_and_token():
    """Full fine-tuning of the 7B shape: 6 N per token, N = layers and head; LoRA: about 4 N."""
    text = TextArch(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_layers=28,
        num_heads=28, num_kv_heads=4, mrope_section=(16, 24, 24),
    )  # fmt: skip
    arch = Arch(
        vision=VisionArch(32, 1280, 3420, 16, 3584, (7, 15, 23, 31)),
        text=text,
    )
    counts = flops.Counts(completion_tokens=1000)
    weights = flops.text_weights(text) + 3584 * 152_064
    full = flops.learning_flops(arch, counts, flops.Training(train_base=True))
    lora = flops.learning_flops(arch, counts, flops.Training(adapter_params=161_480_704))
    assert weights == pytest.approx(7.07e9, rel=0.01)
    assert full["forward"] + full["backward"] == 6 * weights * 1000
    assert lora["forward"] + lora["backward"] == (4 * weights + 6 * 161_480_704) * 1000


def test_recomputation_counts_as_hardware_only():
    counts = flops.Counts(prompt_tokens=5, completion_tokens=7, prompt_pairs=15, completion_pairs=9)
    arch = small_arch()
    plain = flops.learning_flops(arch, counts, flops.Training(adapter_params=3))
    again = flops.learning_flops(arch, counts, flops.Training(adapter_params=3, remat="full"))
    assert plain == again
    model = plain["forward"] + plain["backward"]
    none, dots, full = (
        flops.update_hardware_flops(arch, counts, flops.Training(adapter_params=3, remat=name))
        for name in ("none", "dots", "full")
    )
    head = flops.head_flops(arch.text, 7)
    assert none == model + head
    assert dots == none + flops.attention_flops(arch.text, 24)
    assert full == none + plain["forward"] - head


def test_peaks_by_device_kind():
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5p") == 459e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.peak_flops("cpu") is None


def compiled_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def tree_attention(q, k, v, layer, carry):
    """The update's attention on one group, as in `speciarl_jax.learner.logprobs`."""
    prompt = [x[:, :PROMPT] for x in (q, k, v)]
    own = [x[:, PROMPT:].reshape(1, GROUP, WIDTH, *x.shape[2:]) for x in (q, k, v)]
    whole = jnp.array([PROMPT])
    out_prompt = attend(*prompt, causal_mask(whole, PROMPT))
    out_own = attend_shared(*own, *prompt[1:], jnp.ones((1, PROMPT), bool))
    return jnp.concatenate([out_prompt, out_own.reshape(q[:, PROMPT:].shape)], axis=1), carry, None


@pytest.mark.slow
def test_text_against_xla_on_two_layers_written_out():
    """Forward, and forward + backward with LoRA, of the tree without a scan, to 4 %.

    XLA computes the whole square of a causal mask, so pairs are counted that way here, and it
    leaves out the gradient of the first layer's inputs, which nothing trainable precedes. It also
    counts norms, softmax and rotary angles, hence the tolerance.
    """
    arch = small_arch()
    text = arch.text
    policy = abstract_policy(arch, Dtypes())
    add_lora(policy, LoraConfig(rank=8), seed=0)
    parts = split_policy(policy)
    tokens = PROMPT + GROUP * WIDTH
    hidden = jnp.ones((1, tokens, text.hidden_size))
    angles = text_angles(jnp.broadcast_to(jnp.arange(tokens), (1, 3, tokens)), text)

    def loss(trainable, frozen):
        model = nnx.merge(parts.graphdef, trainable, frozen).text
        graphdef, blocks = nnx.split(model.blocks)
        state = hidden
        for layer in range(text.num_layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda x, i=layer: x[i], blocks))
            state = block(state, angles, tree_attention, layer, None)[0]
        logits = model.logits(state[:, PROMPT:])
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

    counts = flops.Counts(
        prompt_tokens=PROMPT,
        completion_tokens=GROUP * WIDTH,
        prompt_pairs=PROMPT**2,
        completion_pairs=GROUP * WIDTH * (PROMPT + WIDTH),
    )
    training = flops.Training(adapter_params=count_parameters(parts.trainable))
    expected = flops.learning_flops(arch, counts, training)
    forward = compiled_flops(loss, parts.trainable, parts.frozen)
    assert forward == pytest.approx(expected["forward"], rel=0.04)
    whole = compiled_flops(jax.value_and_grad(loss), parts.trainable, parts.frozen)
    qkv, lora = 256 * (256 + 2 * 128), 3 * 256 * 8
    expected_whole = expected["forward"] + expected["backward"] - 2 * (qkv + lora) * tokens
    assert whole == pytest.approx(expected_whole, rel=0.04)


def test_vision_against_xla_on_two_blocks_written_out():
    """Patch embedding, a windowed and a full block, merger; whole windows: no padding."""
    arch = small_arch()
    policy = abstract_policy(arch, Dtypes())
    tower, vision = policy.visual, arch.vision
    patches, windows = 2 * vision.window_patches, 2
    mask = jnp.ones((1, patches), bool)
    angles = jnp.ones((1, patches, vision.head_dim // 2))
    graphdef, state = nnx.split(tower)

    def forward(state, pixels):
        tower = nnx.merge(graphdef, state)
        blockdef, blocks = nnx.split(tower.blocks)
        hidden = tower.patch_embed(pixels)
        for layer, is_full in enumerate((False, True)):
            block = nnx.merge(blockdef, jax.tree.map(lambda x, i=layer: x[i], blocks))
            hidden = block(hidden, angles, mask, is_full)
        return tower.merger(hidden)

    counts = flops.Counts(
        patches=patches,
        window_pairs=windows * vision.window_patches**2,
        image_pairs=patches**2,
    )
    two = VisionArch(2, 64, 96, 2, 256, (1,))
    found = compiled_flops(forward, state, jnp.ones((1, patches, vision.patch_dim)))
    assert found == pytest.approx(flops.vision_flops(two, counts), rel=0.05)
