"""xAR against golden numbers of the public code (golden/README.md), and its layouts of entities."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden import GOLDEN, golden_model, read_golden
from haste.errors import UserError
from haste.models import XAR, CheckpointFile, build_model, get_family, infer_config
from haste.models.entities import Entities
from haste.transport import velocity_loss

FAMILY = get_family("xar")
TINY = {"width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "channels": 3, "grid": 8, "num_classes": 10}
LAYOUTS = [("token", None), ("cell", 4), ("cell", 2), ("subsample", 2), ("subsample", 4), ("scale", 2), ("image", None)]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return read_golden("xar_train.npz")


def tiny(**changes) -> XAR:
    torch.manual_seed(0)
    return build_model({"family": "xar", **TINY, **changes}).eval()


def step(model: XAR, golden, dtype: torch.dtype):
    """The golden training step: output, target and loss."""
    noise = model.entities.join(golden["noise"].flatten(1, 2)).to(dtype)
    x_t, target = FAMILY.interpolate(model, golden["latents"].to(dtype), noise, golden["t"], "linear")
    labels = FAMILY.drop(model, FAMILY.condition(golden["labels"]), golden["label_dropped"])
    output = model(x_t, golden["t"], labels, aligned_layers=(0, 3))
    return output, target, velocity_loss(output.prediction, target)


# ---- the public code's numbers ----


def test_a_training_step_is_the_public_code_s(golden):
    model = golden_model("xar", torch.float64)
    output, _, loss = step(model, golden, torch.float64)
    velocity = model.entities.split(output.prediction)
    torch.testing.assert_close(velocity, golden["velocity_tokens"], rtol=0, atol=1e-9)
    torch.testing.assert_close(loss, golden["loss"], rtol=0, atol=1e-9)
    for (q, k), layer in zip(output.queries_keys, (0, 3), strict=True):
        torch.testing.assert_close(q[0], golden[f"q{layer}"], rtol=0, atol=1e-9)
        torch.testing.assert_close(k[0], golden[f"k{layer}"], rtol=0, atol=1e-9)
    assert output.causal == 64 and output.prefix == 0


def test_the_gradients_are_the_public_code_s(golden):
    model = golden_model("xar", torch.float64)
    step(model, golden, torch.float64)[2].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = {name[5:] for name in golden if name.startswith("norm:")}
    assert norms == set(gradients)
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(golden[f"norm:{name}"].item(), rel=0, abs=1e-9)
    whole = [name[5:] for name in golden if name.startswith("grad:")]
    assert len(whole) == 13
    for name in whole:
        torch.testing.assert_close(gradients[name], golden[f"grad:{name}"], rtol=0, atol=1e-9)


def test_single_precision_is_as_close_as_the_public_code(golden):
    model = golden_model("xar", torch.float32)
    output, _, loss = step(model, golden, torch.float32)
    velocity = model.entities.split(output.prediction).double()
    torch.testing.assert_close(velocity, golden["velocity_tokens"], rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)


def test_the_condition_has_the_truncated_time_of_each_cell(golden):
    model = golden_model("xar", torch.float64)
    labels = torch.where(golden["label_dropped"], 1000, golden["labels"])
    torch.testing.assert_close(model.conditioning(golden["t"], labels), golden["condition"], rtol=0, atol=1e-9)


def test_0_28_is_embedded_as_280_as_in_single_precision():
    model = tiny().double()
    labels = torch.tensor([1])
    at_280 = model.conditioning(torch.tensor([[0.2805]]), labels)
    assert torch.equal(model.conditioning(torch.tensor([[0.28]], dtype=torch.float64), labels), at_280)


# ---- public checkpoints ----


def published(size: str) -> XAR:
    """A model of a published size, without memory."""
    shape = FAMILY.sizes[size]
    half = shape["depth"] // 2
    sizes = {"width": shape["hidden_size"], "heads": shape["num_heads"], "encoder_depth": half, "decoder_depth": half}
    with torch.device("meta"):
        return build_model({"family": "xar", **sizes, "channels": 16, "grid": 16, "num_classes": 1000})


@pytest.mark.parametrize("size, parameters", [("xAR-B", 172_638_224), ("xAR-L", 608_397_968), ("xAR-H", 1_186_024_096)])
def test_published_sizes_have_the_published_parameters(size, parameters):
    assert sum(parameter.numel() for parameter in published(size).parameters()) == parameters


def test_the_names_and_shapes_are_the_public_ones():
    names = json.loads((GOLDEN / "xar_base_names.json").read_text())
    assert {name: list(value.shape) for name, value in published("xAR-B").state_dict().items()} == names


def test_the_state_dict_has_the_public_buffers():
    state = golden_model("xar", torch.float32).state_dict()
    assert state["mask"].shape == (1, 1, 256, 256)
    assert (state["mask"][0, 0, 63, 64:] == -math.inf).all() and not state["mask"][0, 0, 64, :128].any()
    rope = {name.rpartition(".")[2]: value for name, value in state.items() if "encoder_blocks.0.attn.rope" in name}
    assert rope["freqs"].shape == (4,) and rope["freqs_cos"].shape == rope["freqs_sin"].shape == (256, 16)
    assert rope["freqs_cos"][9].tolist()[:2] == pytest.approx([math.cos(1.0)] * 2)  # row 1, column 1


def test_public_files_load_strictly_with_their_buffers_and_without():
    model = golden_model("xar", torch.float32)
    other = golden_model("xar", torch.float32)
    torch.nn.init.zeros_(other.pred.weight)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.pred.weight, model.pred.weight)
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**model.state_dict(), "other": torch.zeros(1)})


def test_the_config_follows_from_public_weights():
    model = golden_model("xar", torch.float32)
    config = infer_config(CheckpointFile(model.state_dict()))
    found = {**config, "class_dropout_prob": 0.1}
    assert found == {
        "family": "xar", "width": 48, "heads": 3, "encoder_depth": 2, "decoder_depth": 2, "mlp_hidden": 128,
        "channels": 16, "grid": 16, "entity": "cell", "entity_size": 8, "num_classes": 1000, "class_dropout_prob": 0.1,
    }  # fmt: skip
    build_model(config).load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    "kind, size", [("token", None), ("cell", 2), ("subsample", 2), ("subsample", 4), ("image", None)]
)
def test_the_order_of_the_tokens_follows_from_public_weights(kind, size):
    model = tiny(entity=kind, entity_size=size)
    config = infer_config(CheckpointFile({**model.state_dict()}))
    assert torch.equal(build_model(config).entities.order, model.entities.order)
    assert build_model(config).entities.bounds == model.entities.bounds


def test_an_unknown_order_of_the_tokens_is_refused():
    state = tiny().state_dict()
    rope = "encoder_blocks.0.attn.rope.freqs_cos"
    with pytest.raises(UserError, match="freqs_cos"):
        infer_config(CheckpointFile({**state, rope: state[rope].flip(0)}))


# ---- entities ----


@pytest.mark.parametrize("kind, size", LAYOUTS)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_an_image_is_whole_again(kind, size, patch_size):
    entities = Entities(kind, 8, size, patch_size)
    x = torch.randn(2, 3, 8 * patch_size, 8 * patch_size)
    tokens = entities.split(x)
    assert tokens.shape == (2, entities.total, 3 * patch_size**2)
    assert torch.equal(entities.join(tokens), x)
    assert sum(entities.sizes) == entities.total and entities.bounds[-1][1] == entities.total
    assert sorted(entities.order.tolist()) == list(range(64))


def test_cells_are_squares_row_by_row():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = Entities("cell", 4, 2).split(x)[0, :, 0]
    assert tokens.view(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_subsamples_are_tokens_at_a_distance():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = Entities("subsample", 4, 2).split(x)[0, :, 0]
    assert tokens.view(4, 4).tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]


def test_scales_are_means_and_the_last_is_the_image():
    x = torch.randn(2, 3, 8, 8)
    entities = Entities("scale", 8, 2)
    tokens = entities.split(x)
    assert entities.sizes == (4, 16, 64) and entities.prefix == 20 and entities.causal == 0
    torch.testing.assert_close(tokens[:, 0], x[:, :, :4, :4].mean((2, 3)))
    assert torch.equal(tokens[:, 20:], x.flatten(2).transpose(1, 2))
    assert entities.coordinates[0].tolist() == [1.5, 1.5] and entities.coordinates[-1].tolist() == [7, 7]


@pytest.mark.parametrize("kind, size", LAYOUTS)
def test_a_later_entity_is_not_seen(kind, size):
    """The velocity of an entity does not change with what comes after it, and does with what came before."""
    model = tiny(entity=kind, entity_size=size).double()
    entities, y = model.entities, torch.tensor([1])
    tokens = torch.randn(1, entities.total, 3, dtype=torch.float64)
    t = torch.rand(1, entities.count)
    before = model(tokens, t, y).prediction
    changed = tokens.clone()
    last, _ = entities.bounds[-1]
    changed[:, last:] += 1
    after = model(changed, t, y).prediction
    torch.testing.assert_close(after[:, :last], before[:, :last], rtol=0, atol=1e-13)
    if entities.count > 1:
        changed = tokens.clone()
        changed[:, : entities.sizes[0]] += 1
        assert (model(changed, t, y).prediction[:, last:] - before[:, last:]).abs().max() > 1e-6


@pytest.mark.parametrize("kind, size", LAYOUTS)
def test_a_call_per_entity_is_the_mask(kind, size, monkeypatch):
    entities = tiny(entity=kind, entity_size=size).entities
    tokens = torch.randn(2, entities.total, 3, dtype=torch.float64)
    t, y = torch.rand(2, entities.count), torch.tensor([1, 2])
    velocities = []
    for most, least in ((0, 0), (1000, 0)):
        monkeypatch.setattr("haste.models.xar.MOST_CALLS", most)
        monkeypatch.setattr("haste.models.xar.LEAST_TOKENS", least)
        velocities.append(tiny(entity=kind, entity_size=size).double()(tokens, t, y).prediction)
    torch.testing.assert_close(*velocities, rtol=0, atol=1e-12)


def test_a_clean_context_is_what_sampling_sees():
    """Each noisy entity as a forward pass computes it whose earlier entities are clean, at t = 0."""
    model = tiny(context="clean", entity_size=4).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    t, y = torch.rand(2, 4), torch.tensor([1, 2])
    x_t, _ = FAMILY.interpolate(model, x, torch.randn_like(x), t, "linear")
    assert x_t.shape == (2, 6, 8, 8)
    split = model.entities.split
    velocity = split(model(x_t, t, y).prediction)
    noisy, clean = split(x_t[:, :3]), split(x)
    for number, (lo, hi) in enumerate(model.entities.bounds):
        seen = torch.cat([clean[:, :lo], noisy[:, lo:]], dim=1)
        times = torch.cat([torch.zeros(2, number), t[:, number:]], dim=1)
        alone = model(seen, times, y).prediction[:, lo:hi]
        torch.testing.assert_close(velocity[:, lo:hi], alone, rtol=0, atol=1e-12)


def test_times_follow_the_context():
    torch.manual_seed(0)
    for context, check in (("increasing", lambda d: (d >= 0).all()), ("decreasing", lambda d: (d <= 0).all()),
                           ("random", lambda d: (d > 0).any() and (d < 0).any())):  # fmt: skip
        t = FAMILY.sample_times(tiny(context=context), 64, "lognormal", "linear")
        assert t.shape == (64, 4) and t.min() > 0 and t.max() < 1
        assert check(t.diff(dim=1))


def test_one_time_is_that_of_all_entities():
    model = tiny()
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    t = torch.tensor([0.2, 0.7])
    assert torch.equal(model(x, t, y).prediction, model(x, t[:, None].expand(2, 4), y).prediction)


def test_dropout_acts_in_training_mode_only():
    model = tiny(dropout=0.5)
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2, 4), torch.tensor([0, 3])
    assert torch.equal(model(*inputs).prediction, model(*inputs).prediction)
    model.train()
    assert not torch.equal(model(*inputs).prediction, model(*inputs).prediction)


def test_projections_are_of_the_image_s_tokens():
    torch.manual_seed(0)
    for kind, size in LAYOUTS:
        config = {"family": "xar", **TINY, "entity": kind, "entity_size": size, "align_depth": 2, "projector_dim": 8}
        model = build_model(config, z_dims=(5,))
        output = model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3]), aligned_layers=(1,), project=True)
        assert output.projections[0].shape == (2, 64, 5)
        assert output.queries_keys[0][0].shape == (2, 2, output.prefix + 64, 8)
        assert output.order.shape == (64,)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"entity_size": 3}, "--entity-size"), ({"entity": "scale", "entity_size": 5}, "--entity-size"),
        ({"entity": "token", "entity_size": 2}, "--entity-size"), ({"entity": "row"}, "--entity"),
        ({"heads": 3}, "--hidden-size"), ({"encoder_depth": 1, "decoder_depth": 0}, "--depth"),
        ({"context": "noisy"}, "context"), ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "dropout"),
        ({"class_dropout_prob": 5.0}, "class_dropout_prob"), ({"channels": 0}, "channels"), ({"grid": 0}, "grid"),
        ({"patch_size": 0}, "patch_size"), ({"num_classes": 0}, "num_classes"),
        ({"cells_per_side": 3}, "cells_per_side"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_named(changes, named):
    with pytest.raises(UserError, match=f"^{named} must"):
        build_model({"family": "xar", **TINY, **changes})


def test_a_name_that_no_config_has_is_refused():
    with pytest.raises(UserError, match="got entitysize$"):
        build_model({"family": "xar", **TINY, "entitysize": 4})


@pytest.mark.parametrize(
    "x, t, y", [((2, 4, 8, 8), (2,), (2,)), ((2, 3, 8, 8), (2, 3), (2,)), ((2, 3, 8, 8), (2,), (3,))]
)
def test_inputs_of_a_wrong_shape_are_named(x, t, y):
    with pytest.raises(ValueError, match="must have shape"):
        tiny()(torch.zeros(x), torch.zeros(t), torch.zeros(y, dtype=torch.int64))


def test_a_model_trains_after_inference_mode():
    model = tiny()
    inputs = torch.randn(2, 3, 8, 8), torch.rand(2, 4), torch.tensor([0, 3])
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).prediction.sum().backward()
    assert model.encoder_blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_training_flops_are_counted_by_the_profiler():
    from torch.utils.flop_counter import FlopCounterMode

    config = {"family": "xar", **TINY, "entity_size": 4}
    model = build_model(config)
    inputs = torch.randn(1, 3, 8, 8), torch.rand(1, 4), torch.tensor([0])
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    counted = counter.get_total_flops()
    attention = 2 * 2 * 2 * 16 * 16 * (16 + 32 + 48 + 64)  # which the counter misses where sdpa is one operation
    assert FAMILY.training_flops(config) / 3 in (counted, counted + attention)
