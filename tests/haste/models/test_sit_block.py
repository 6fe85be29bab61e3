"""SiT with LightningDiT's parts: rotary positions, RMS norms, SwiGLU, norms of q and k."""

from __future__ import annotations

import copy

import pytest
import torch
from haste.errors import UserError
from haste.models import DiT, SiT, build_model, find_size, get_family
from haste.models.layers import RotaryPositions
from public_names import lightningdit_shapes, plain_forward, plain_rotate
from torch.utils.flop_counter import FlopCounterMode

SMALL = {"input_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 48, "depth": 2, "num_heads": 4,
         "num_classes": 10, "encoder_depth": 1, "projector_dim": 24}  # fmt: skip
ALL = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
SWITCHES = [{name: value} for name, value in ALL.items()]


def small_model(kind=SiT, **overrides) -> SiT:
    """A small model in which nothing is zero, as after some training."""
    torch.manual_seed(0)
    model = kind(**{**SMALL, **overrides})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_batch(dtype=torch.float32, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 6, 6, generator=generator, dtype=dtype)
    return x, torch.rand(count, generator=generator, dtype=dtype), torch.arange(count)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("switches", [*SWITCHES, ALL, {"norm": "rmsnorm", "patch_size": 1}], ids=str)
def test_each_switch_is_what_the_public_code_computes(switches, qk_norm):
    if qk_norm and switches.get("norm") != "rmsnorm":
        pytest.skip("the norm of q and k has a bias then, which LightningDiT's has not")
    model = small_model(**switches, qk_norm=qk_norm).double()
    x, t, y = small_batch(torch.float64)
    expected = plain_forward(model.state_dict(), x, t, y, heads=4, patch=switches.get("patch_size", 2))
    near = {"rtol": 1e-6, "atol": 1e-6} if "positions" in switches else {"rtol": 1e-10, "atol": 1e-10}  # fp32 tables
    torch.testing.assert_close(model(x, t, y).prediction, expected, **near)
    assert not torch.allclose(expected, small_model().double()(x, t, y).prediction, rtol=1e-2)


def test_dit_has_the_same_switches():
    model = small_model(DiT, **ALL).double()
    x, _, y = small_batch(torch.float64)
    t = torch.tensor([0, 20, 999])
    expected = plain_forward(model.state_dict(), x, t.double(), y, heads=4, patch=2)
    torch.testing.assert_close(model(x, t, y).prediction, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("LightningDiT-XL/1", lightningdit_shapes(28, 1152, 16, 16, 1, 32)),
        ("LightningDiT-B/2", lightningdit_shapes(12, 768, 12, 8, 2, 32)),
    ],
)
def test_names_and_shapes_are_the_public_ones(name, expected):
    config = {**find_size(name)[1], "input_size": 16, "in_channels": 32}
    with torch.device("meta"):
        model = build_model(config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert get_family("sit").size_name(config) == name


def test_published_sizes_of_lightningdit():
    names = [name for name in get_family("sit").sizes if name.startswith("LightningDiT")]
    assert sorted(names) == sorted(
        f"LightningDiT-{name}" for name in ("B/1", "B/2", "L/2", "XL/1", "XL/2", "1p0B/1", "1p0B/2", "1p6B/1", "1p6B/2")
    )
    assert find_size("SiT-S/1")[1] == {
        "depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 1,
        "positions": "sincos", "norm": "layernorm", "mlp": "gelu",
    }  # fmt: skip


def test_rotary_positions_turn_pairs_of_channels_by_row_and_column():
    rope, grid = RotaryPositions(24, 5), 5
    x = torch.randn(2, 25, 24)
    torch.testing.assert_close(rope(x), plain_rotate(x, grid), rtol=1e-4, atol=1e-5)
    assert torch.equal(rope(x)[:, 0], x[:, 0])  # row 0 and column 0 turn nothing
    longer = torch.cat([torch.ones(2, 3, 24), x], dim=1)
    torch.testing.assert_close(rope(longer), torch.cat([torch.ones(2, 3, 24), rope(x)], dim=1))


def test_rotated_logits_depend_on_distances_alone():
    rope, grid = RotaryPositions(16, 6).double(), 6
    q, k = (torch.randn(16, dtype=torch.float64).expand(36, 16) for _ in range(2))
    logits = (rope(q) @ rope(k).T).view(grid, grid, grid, grid)
    torch.testing.assert_close(logits[1, 2, 3, 1], logits[2, 4, 4, 3], rtol=1e-6, atol=1e-6)
    assert not torch.isclose(logits[1, 2, 3, 1], logits[1, 2, 1, 3], rtol=1e-3)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_alignment_reads_queries_and_keys_after_norm_and_rotation(qk_norm):
    """Attention with them, recomputed, is what goes into the projection."""
    model = small_model(**ALL, qk_norm=qk_norm)
    seen = {}
    attn = model.blocks[1].attn
    attn.qkv.register_forward_hook(lambda _, args, out: seen.update(packed=out))
    attn.proj.register_forward_hook(lambda _, args, out: seen.update(attended=args[0]))
    ((q, k),) = model(*small_batch(), aligned_layers=(1,)).queries_keys
    v = seen["packed"].unflatten(2, (3, 4, 12))[:, :, 2].transpose(1, 2)
    attended = (q @ k.mT * 12**-0.5).softmax(-1) @ v
    torch.testing.assert_close(attended.transpose(1, 2).flatten(2), seen["attended"])
    own = seen["packed"].unflatten(2, (3, 4, 12))[:, :, 0].transpose(1, 2)
    assert not torch.allclose(q, own, rtol=1e-2)


def test_a_block_compiles_as_one_graph():
    """As --compile does, block by block."""
    model = small_model(**ALL, qk_norm=True)
    tokens, c = model.embed(*small_batch())
    block = model.blocks[0]
    grads = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out, (q, k) = run(tokens, c, True)
        loss = out.square().mean() + (q * k).mean()
        grads.append(torch.autograd.grad(loss, (block.attn.q_norm.weight, block.norm2.weight), retain_graph=True))
    torch.testing.assert_close(grads[1], grads[0])


def test_autocast_gives_bf16_queries_close_to_fp32():
    model = small_model(**ALL, qk_norm=True)
    x, t, y = small_batch()
    exact = model(x, t, y, aligned_layers=(1,))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, y, aligned_layers=(1,))
    q, k = output.queries_keys[0]
    assert q.dtype == k.dtype == torch.bfloat16
    assert (q.float() - exact.queries_keys[0][0]).norm() < 0.02 * exact.queries_keys[0][0].norm()
    assert (output.prediction.float() - exact.prediction).norm() < 0.05 * exact.prediction.norm()


def test_a_copy_rotates_by_its_own_tables():
    """As of the EMA: the model's tables are known to its blocks, and are moved and copied with it."""
    model = small_model(**ALL)
    copied = copy.deepcopy(model)
    assert all(block.attn.rope is copied.feat_rope for block in copied.blocks)
    assert copied.feat_rope is not model.feat_rope
    half = copied.to(torch.bfloat16)
    x, t, y = small_batch()
    assert half(x.bfloat16(), t, y).prediction.dtype == torch.bfloat16
    assert sum("freqs" in name for name in model.state_dict()) == 2


def test_a_new_model_is_the_identity_and_predicts_zero():
    model = SiT(**SMALL, **ALL)
    x, t, y = small_batch()
    tokens, c = model.embed(x, t, y)
    for block in model.blocks:
        assert torch.equal(block(tokens, c)[0], tokens)
        assert torch.equal(block.norm1.weight, torch.ones(48))
    assert torch.equal(model(x, t, y).prediction, torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["sit", "dit"])
@pytest.mark.parametrize("switches", [{}, ALL], ids=str)
def test_training_flops_are_those_of_the_matrix_products(kind, switches):
    config = {**SMALL, **switches, "fused_attn": False}  # of fused attention nothing is counted
    model = get_family(kind).build(config)
    x, t, y = small_batch(count=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, (t * 900).int() if kind == "dit" else t, y)
    embedders = 2 * (256 * 48 + 48 * 48) + 2 * 2 * 48 * 48  # of the time, and the final modulation: left out
    assert get_family(kind).training_flops(config) == 3 * (counter.get_total_flops() - embedders)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"positions": "rope", "hidden_size": 24}, "^positions must be sincos for heads of 6 channels, .*, got rope"),
        ({"positions": "learned"}, "^positions must be one of sincos, rope, got 'learned'"),
        ({"norm": "batchnorm"}, "^norm must be one of layernorm, rmsnorm, got 'batchnorm'"),
        ({"mlp": "relu"}, "^mlp must be one of gelu, swiglu, got 'relu'"),
    ],
)
def test_what_no_block_has(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        SiT(**{**SMALL, **arguments})
