"""SiT against the public checkpoints' names, an independent forward pass, and its promises to alignment."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from haste.errors import UserError
from haste.models import SIT_MODELS, SiT, build_model, find_size, get_family, register
from haste.models.layers import sincos_positions
from public_names import plain_forward, public_shapes
from torch.utils.checkpoint import checkpoint

SMALL = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 4}


def small_sit(**overrides) -> SiT:
    """A small SiT in which nothing is zero, as after some training."""
    torch.manual_seed(0)
    model = SiT(**{**SMALL, "num_classes": 10, "encoder_depth": 2, "projector_dim": 24, **overrides})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_batch(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.rand(3, generator=generator, dtype=dtype), torch.tensor([1, 7, 4])


@pytest.mark.parametrize(
    "name, z_dims, expected",
    [
        ("SiT-XL/2", (768,), public_shapes(28, 1152, 256, 2, 4, (768,))),
        ("SiT-B/2", (768, 1024), public_shapes(12, 768, 256, 2, 4, (768, 1024))),
        ("SiT-L/4", (), public_shapes(24, 1024, 64, 4, 4)),
        ("SiT-S/8", (), public_shapes(12, 384, 16, 8, 4)),
    ],
)
def test_names_and_shapes_are_the_public_ones(name, z_dims, expected):
    with torch.device("meta"):
        model = build_model({**SIT_MODELS[name]}, z_dims=z_dims)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_qk_norm_has_timm_names():
    names = set(small_sit(qk_norm=True).state_dict()) - set(small_sit().state_dict())
    norms = {f"attn.{norm}.{kind}" for norm in ("q_norm", "k_norm") for kind in ("weight", "bias")}
    assert names == {f"blocks.{block}.{norm}" for block in range(3) for norm in norms}


def test_every_published_size_is_there():
    sizes = [f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (1, 2, 4, 8)]
    assert sorted(SIT_MODELS) == sorted(sizes)


def test_the_order_of_parameters_is_the_public_one():
    """An optimizer's state in a public checkpoint refers to parameters by their number."""
    groups = [name.split(".")[0] for name, _ in small_sit(z_dims=(5,)).named_parameters()]
    assert list(dict.fromkeys(groups)) == [
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projectors", "final_layer",
    ]  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
def test_forward_is_what_the_paper_says(fused):
    model = small_sit(fused_attn=fused).double()
    x, t, y = small_batch(torch.float64)
    expected = plain_forward(model.state_dict(), x, t, y, heads=4, patch=2)
    torch.testing.assert_close(model(x, t, y).prediction, expected, rtol=1e-10, atol=1e-10)


def test_positions():
    width, grid = 16, 5
    positions = sincos_positions(width, grid)
    row, column = 3, 1
    expected = [
        function(coordinate / 10000 ** (i / 4)) for coordinate in (column, row) for function in (math.sin, math.cos)
        for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(positions[row * grid + column], torch.tensor(expected))
    assert positions.shape == (25, 16) and positions.dtype == torch.float32


def test_a_new_model_is_the_identity_and_predicts_zero():
    torch.manual_seed(0)
    model = SiT(**SMALL, num_classes=10)
    x, t, y = small_batch()
    tokens, c = model.embed(x, t, y)
    for block in model.blocks:
        assert torch.equal(block(tokens, c)[0], tokens)
    assert torch.equal(model(x, t, y).prediction, torch.zeros_like(x))
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    patch = model.x_embedder.proj.weight
    assert patch.abs().max().item() == pytest.approx(math.sqrt(6 / (12 + 32)), rel=0.02)  # Xavier of a 12 → 32 map
    assert not model.pos_embed.requires_grad


# -- what alignment reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_are_those_of_attention(qk_norm):
    """Recomputed from what went into the projection; without qk_norm they are the projection's own memory."""
    model = small_sit(qk_norm=qk_norm)
    seen = {}
    for index, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda _, args, out, i=index: seen.update({i: (args[0], out)}))
    x, t, y = small_batch()
    output = model(x, t, y, aligned_layers=(2, 0))

    assert len(output.queries_keys) == 2 and output.projections == []
    for layer, (q, k) in zip((2, 0), output.queries_keys, strict=True):
        tokens, packed = seen[layer]
        attn = model.blocks[layer].attn
        q_weight, k_weight, _ = attn.qkv.weight.chunk(3)
        q_bias, k_bias, _ = attn.qkv.bias.chunk(3)
        for got, weight, bias, norm in ((q, q_weight, q_bias, attn.q_norm), (k, k_weight, k_bias, attn.k_norm)):
            expected = norm(F.linear(tokens, weight, bias).unflatten(2, (4, 8)).transpose(1, 2))
            torch.testing.assert_close(got, expected)
            assert got.shape == (3, 4, 16, 8)
            shares = got.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
            assert shares == (not qk_norm)


def test_gradient_of_the_maps_stays_below_the_aligned_layer():
    model = small_sit()
    ((q, k),) = model(*small_batch(), aligned_layers=(1,)).queries_keys
    (q @ k.mT).square().mean().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "blocks.1.attn.qkv.weight" in touched and "blocks.0.mlp.fc2.weight" in touched
    assert not any(name.startswith(("blocks.1.attn.proj", "blocks.1.mlp", "blocks.2", "final")) for name in touched)


def test_nothing_of_alignment_exists_unless_it_is_asked_for():
    model = small_sit(z_dims=(5,))
    calls = []
    model.projectors[0].register_forward_hook(lambda *_: calls.append(1))
    output = model(*small_batch())
    assert output.queries_keys == [] and output.projections == [] and not calls


def test_projections_read_the_tokens_after_encoder_depth():
    model = small_sit(z_dims=(5, 7))
    after = []
    model.blocks[1].register_forward_hook(lambda _, __, out: after.append(out[0]))
    output = model(*small_batch(), project=True)
    assert [tuple(p.shape) for p in output.projections] == [(3, 16, 5), (3, 16, 7)]
    for projection, projector in zip(output.projections, model.projectors, strict=True):
        torch.testing.assert_close(projection, projector(after[0]))


def test_one_seed_gives_one_trunk_with_projectors_and_without():
    states = []
    for z_dims in ((), (5,), (5, 7)):
        torch.manual_seed(0)
        states.append(SiT(**SMALL, encoder_depth=1, z_dims=z_dims, projector_dim=8).state_dict())
    for state in states[1:]:
        assert any(name.startswith("projectors.") for name in state)
        for name, value in states[0].items():
            assert torch.equal(state[name], value), name
    assert not torch.equal(states[2]["projectors.0.2.weight"], states[2]["projectors.1.2.weight"])


# -- training ---------------------------------------------------------------------------------------------------


def test_labels_are_dropped_in_training_only():
    torch.manual_seed(0)
    model = small_sit(class_dropout_prob=0.25)
    embedder, labels = model.y_embedder, torch.zeros(4000, dtype=torch.long)
    rows = embedder.embedding_table.weight
    assert torch.equal(embedder(labels), rows[0].expand(4000, -1))
    embedder.train()
    dropped = (embedder(labels) == rows[10]).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(embedder(labels)[0], rows[0]) or torch.equal(embedder(labels)[0], rows[10])
    assert model.null_label == 10


def test_without_dropout_there_is_no_null_class():
    model = small_sit(class_dropout_prob=0.0).train()
    assert model.y_embedder.embedding_table.weight.shape[0] == 10 and model.null_label is None
    x, t, y = small_batch()
    assert torch.equal(model(x, t, y).prediction, model(x, t, y).prediction)


@pytest.mark.parametrize("qk_norm, arguments", [(False, {}), (True, {"aligned_layers": (1, 0), "project": True})])
def test_compiles_as_one_graph(qk_norm, arguments):
    model = small_sit(depth=2, z_dims=(5,), qk_norm=qk_norm)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [run(*small_batch(), **arguments) for run in (model, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0])
    grads = []
    for output in outputs:
        loss = output.prediction.square().mean() + sum((q * k).mean() for q, k in output.queries_keys)
        grads.append(torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight)[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_gives_bf16_queries_close_to_fp32(qk_norm):
    model = small_sit(qk_norm=qk_norm)
    x, t, y = small_batch()
    exact = model(x, t, y, aligned_layers=(1,))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, t, y, aligned_layers=(1,))
    q, k = output.queries_keys[0]
    assert q.dtype == k.dtype == torch.bfloat16
    assert (q.float() - exact.queries_keys[0][0]).norm() < 0.02 * exact.queries_keys[0][0].norm()
    assert (output.prediction.float() - exact.prediction).norm() < 0.05 * exact.prediction.norm()


def test_a_block_can_be_checkpointed():
    """Run twice by activation checkpointing, a block gives the same gradients; q and k come out once."""
    model = small_sit()
    tokens, c = model.embed(*small_batch())
    tokens = tokens.detach().requires_grad_()
    grads = []
    for run in (model.blocks[0], lambda *args: checkpoint(model.blocks[0], *args, use_reentrant=False)):
        out, (q, k) = run(tokens, c.detach(), True)
        grads.append(torch.autograd.grad(out.square().sum() + (q * k).sum(), tokens)[0])
    torch.testing.assert_close(grads[1], grads[0])


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"hidden_size": 30, "num_heads": 4}, "^hidden_size must be a multiple of num_heads, 4, got 30"),
        ({"hidden_size": 30, "num_heads": 5}, "^hidden_size must be a multiple of 4, .* got 30"),
        ({"input_size": 9}, "^input_size must be a multiple of patch_size, 2, got 9"),
        ({"depth": 0}, "^depth must be at least 1, got 0"),
        ({"class_dropout_prob": 1.5}, "^class_dropout_prob must be .* got 1.5"),
        ({"z_dims": (5,), "encoder_depth": 4}, "encoder_depth must be from 1 to the depth"),
    ],
)
def test_sizes_that_do_not_fit(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        SiT(**{**SMALL, **sizes})


def test_sizes_have_their_published_names():
    name = get_family("sit").size_name
    assert name({**SIT_MODELS["SiT-XL/2"], "input_size": 32}) == "SiT-XL/2"
    assert name({"depth": 1, "hidden_size": 8, "num_heads": 1, "patch_size": 2}) == (
        "a SiT of depth 1, hidden_size 8, num_heads 1, patch_size 2"
    )


def test_unknown_model():
    with pytest.raises(UserError, match="--model must be one of .*SiT-S/1, SiT-S/2, .*, got 'SiT-M/2'"):
        find_size("SiT-M/2")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"x": torch.zeros(3, 3, 4, 4)}, r"x must have shape \(batch, 3, 8, 8\)"),
        ({"t": torch.zeros(2)}, "t must have shape"),
        ({"t": 0.5}, r"t must be a tensor of shape \(3,\), as x, got 0\.5"),
        ({"y": torch.zeros(3, 1)}, "y must have shape"),
        ({"aligned_layers": (3,)}, "aligned_layers must be from 0 to 2, got 3"),
        ({"aligned_layers": (-1,)}, "aligned_layers must be .* got -1"),
        ({"project": True}, "project must be False"),
    ],
)
def test_wrong_calls(change, sentence):
    x, t, y = small_batch()
    with pytest.raises(ValueError, match=sentence):
        small_sit()(**{"x": x, "t": t, "y": y, **change})


def test_what_is_no_config_and_no_family_is_refused():
    with pytest.raises(UserError, match="config must be a dictionary, .* got 'SiT-S/8'"):
        build_model("SiT-S/8")
    with pytest.raises(TypeError, match="family must be an instance of haste.models.Family, got 3"):
        register(3)
