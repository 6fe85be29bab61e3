"""MM-DiT against golden numbers of the public code (golden/README.md), and its side of the protocol of families."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from golden import GOLDEN, golden_config, golden_model, read_golden
from haste.alignment import Aligner
from haste.alignment.aligner import LayerMap
from haste.errors import UserError
from haste.models import (
    CheckpointFile,
    MMDiT,
    build_model,
    check_config,
    find_size,
    get_family,
    infer_config,
    new_config,
)
from haste.samplers import sample
from haste.teachers.encoder import TeacherOutput
from haste.training.checkpoint import loaded_model
from haste.training.config import TrainConfig
from haste.transport import velocity_loss

import haste_ext

FAMILY = get_family("mmdit")
COCO = {
    "family": "mmdit", **find_size("MM-DiT-COCO")[1], "input_size": 32, "in_channels": 4, "context_tokens": 77,
    "context_width": 768,
}  # fmt: skip
TINY = {**COCO, "depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "context_tokens": 5, "context_width": 6}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return read_golden("mmdit_train.npz")


def step(model: MMDiT, golden, dtype: torch.dtype):
    """The golden training step: output and target."""
    x, noise, t, context = (golden[name].to(dtype) for name in ("latents", "noise", "t", "context"))
    x_t, target = FAMILY.interpolate(model, x, noise, t, "linear")
    return model(x_t, t, context, aligned_layers=(0, 1), project=True), target


def teacher_of(golden) -> TeacherOutput:
    pairs = [(golden[f"teacher_q{layer}"].double(), golden[f"teacher_k{layer}"].double()) for layer in (1, 2)]
    return TeacherOutput(pairs, 1, golden["teacher_features"].double())


def golden_aligner() -> Aligner:
    """HASTE's losses of two layers of the student, each with the coefficient 0.5."""
    return Aligner([SimpleModule()], LayerMap(student=(0, 1), teacher=(1, 2)), 0.5, 0.5)


class SimpleModule(torch.nn.Module):
    width = 24


# ---- the public code's numbers ----


def test_a_training_step_is_the_public_code_s(golden):
    model = golden_model("mmdit", torch.float64)
    output, target = step(model, golden, torch.float64)
    torch.testing.assert_close(output.prediction, golden["velocity"], rtol=0, atol=1e-9)
    velocity = velocity_loss(output.prediction, target)
    torch.testing.assert_close(velocity, golden["denoising"].mean(), rtol=0, atol=1e-9)
    torch.testing.assert_close(output.projections[0][0], golden["projected"], rtol=0, atol=1e-9)
    q, k = output.queries_keys[0]
    for own, name in ((q, "q0"), (k, "k0")):  # which the file has in float32
        torch.testing.assert_close(own[0].float(), golden[name], rtol=1e-6, atol=1e-6)
    assert output.prefix == 77


def test_both_losses_and_all_gradients_are_the_public_code_s(golden):
    model, aligner = golden_model("mmdit", torch.float64), golden_aligner()
    output, target = step(model, golden, torch.float64)
    losses = aligner.losses_of(output, [teacher_of(golden)])
    each = [
        haste_ext.attn_align_loss(q[:, :2], k[:, :2], *pair, student_prefix=77, teacher_prefix=1)
        for (q, k), pair in zip(output.queries_keys, teacher_of(golden).queries_keys, strict=True)
    ]
    torch.testing.assert_close(torch.stack(each), golden["L_A"], rtol=0, atol=1e-9)
    torch.testing.assert_close(losses.attention.double(), golden["L_A"].mean(), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.feature.double(), golden["L_R"], rtol=0, atol=1e-6)
    feature = haste_ext.token_cosine_loss(output.projections[0], teacher_of(golden).patch_tokens)
    total = velocity_loss(output.prediction, target) + 0.5 * torch.stack(each).mean() + 0.5 * feature
    torch.testing.assert_close(total, golden["total"], rtol=0, atol=1e-9)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = {name[5:] for name in golden if name.startswith("norm:")}
    assert norms == gradients.keys()
    for name in norms:
        assert gradients[name].norm().item() == pytest.approx(golden[f"norm:{name}"].item(), rel=0, abs=1e-9)
    whole = [name[5:] for name in golden if name.startswith("grad:")]
    assert len(whole) == 12
    for name in whole:
        torch.testing.assert_close(gradients[name], golden[f"grad:{name}"], rtol=0, atol=1e-9)


def test_single_precision_is_as_close_as_the_public_code(golden):
    output, _ = step(golden_model("mmdit", torch.float32), golden, torch.float32)
    torch.testing.assert_close(output.prediction.double(), golden["velocity"], rtol=0, atol=1e-5)


def test_the_time_alone_is_the_conditioning(golden):
    model = golden_model("mmdit", torch.float64)
    context, t = golden["context"].double(), golden["t"].double()
    torch.testing.assert_close(model.conditioning(t, context), golden["conditioning"], rtol=0, atol=1e-9)
    at_two_times = model.conditioning(t[:, None], context[:1].expand(3, -1, -1))
    assert at_two_times.shape == (2, 3, 96) and torch.equal(at_two_times[:, 0], at_two_times[:, 2])


@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_a_guided_run_is_the_public_code_s(golden, guidance):
    run, model = read_golden("mmdit_sample_ode.npz"), golden_model("mmdit", torch.float64)
    made = sample(
        model, run["noise"].double(), golden["context"].double(), num_steps=5, cfg_scale=2.25, guidance=guidance,
        null=run["empty_context"].double(),
    )  # fmt: skip
    torch.testing.assert_close(made, run["latents"], rtol=0, atol=1e-9)


def guided(model, x, t, context, null, scale: float):
    """The velocity of one text after the other, in float64."""
    each = [model(x, torch.full((len(x),), t, dtype=x.dtype), c).prediction for c in (context, null.expand_as(context))]
    return each[1] + scale * (each[0] - each[1])


@pytest.mark.parametrize("high", [1.0, 0.7])
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_every_sampler_follows_its_equations(golden, sampler, high):
    """Written out, step by step, on the linear path; guided steps begin at t ≤ high."""
    run, model = read_golden("mmdit_sample_ode.npz"), golden_model("mmdit", torch.float64)
    context, null, x = golden["context"].double(), run["empty_context"].double(), run["noise"].double()
    kicks = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        made = sample(model, x, context, num_steps=4, sampler=sampler, cfg_scale=2.25, guidance_high=high, null=null,
                      step_noise=kicks if sampler == "euler-maruyama" else None)  # fmt: skip
        grid = torch.linspace(1, 0, 5, dtype=torch.float64).tolist()
        if sampler == "euler-maruyama":
            grid = [*torch.linspace(1, 0.04, 4, dtype=torch.float64).tolist(), 0.0]
        for step, (t, t_next) in enumerate(pairwise(grid)):
            scale = 2.25 if t <= high else 1.0
            v = guided(model, x, t, context, null, scale)
            if sampler == "euler-maruyama":
                score = -((1 - t) * v + x) / t
                x = (
                    x
                    + (v - t * score) * (t_next - t)
                    + (kicks[step] * (2 * t * (t - t_next)) ** 0.5 if step < 3 else 0)
                )
            elif sampler == "heun" and step < 3:
                there = x + (t_next - t) * v
                x = x + (t_next - t) * (v + guided(model, there, t_next, context, null, scale)) / 2
            else:
                x = x + (t_next - t) * v
    torch.testing.assert_close(made, x, rtol=0, atol=1e-9)


def test_the_coco_model_has_the_public_names_shapes_and_order():
    with torch.device("meta"):
        model = build_model(COCO, z_dims=[768])
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert list(shapes.items()) == list(json.loads((GOLDEN / "mmdit_coco_names.json").read_text()).items())
    assert sum(parameter.numel() for parameter in model.parameters()) == 512_415_504
    own = [parameter for name, parameter in model.named_parameters() if not name.startswith("projectors.")]
    assert sum(parameter.numel() for parameter in own) == 505_070_608


# ---- what alignment is handed ----


def test_queries_and_keys_are_views_of_the_joint_projection():
    model = build_model(TINY).eval()
    q, k = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 6), aligned_layers=[1]).queries_keys[0]
    assert q.shape == k.shape == (2, 2, 5 + 16, 16)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and not q.is_contiguous()


def test_the_layers_are_given_in_the_order_that_was_asked_for():
    model = build_model(TINY).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 6)
    (first, _), (last, _) = model(*inputs, aligned_layers=[1, 0]).queries_keys
    ((alone, _),) = model(*inputs, aligned_layers=[0]).queries_keys
    assert torch.equal(last, alone) and not torch.equal(first, alone)


def test_a_text_may_have_any_length():
    model = build_model(TINY).eval()
    output = model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.randn(1, 3, 6), aligned_layers=[0])
    assert output.prefix == 3 and output.queries_keys[0][0].shape[2] == 3 + 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 4, 6, 8)}, "x must have shape"),
        ({"t": torch.zeros(3)}, "t must have shape"),
        ({"context": torch.zeros(2, 5, 7)}, "context must have shape"),
        ({"context": torch.zeros(3, 5, 6)}, "context must have shape"),
        ({"aligned_layers": [2]}, "aligned_layers must be from 0 to 1"),
        ({"project": True}, "project must be False"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, named):
    inputs = {"x": torch.zeros(2, 4, 8, 8), "t": torch.zeros(2), "context": torch.zeros(2, 5, 6)}
    with pytest.raises(ValueError, match=named):
        build_model(TINY)(**{**inputs, **change})


# ---- the family ----


def test_dropped_rows_are_those_of_the_empty_caption():
    model, context, null = build_model(TINY), torch.randn(3, 5, 6), torch.randn(5, 6)
    assert FAMILY.null(model) is None
    FAMILY.set_null(model, null)
    dropped = FAMILY.drop(model, context, torch.tensor([False, True, False]))
    assert torch.equal(dropped[1], null) and torch.equal(dropped[[0, 2]], context[[0, 2]])


def test_a_checkpoint_brings_the_empty_caption():
    model, null = build_model(TINY), torch.randn(5, 6)
    checkpoint = {"model_config": TINY, "model": model.state_dict(), "ema": model.state_dict(), "null": null}
    assert torch.equal(FAMILY.null(loaded_model(checkpoint)), null)


def test_the_layout_names_the_shape_of_the_condition():
    layout = FAMILY.layout(TINY)
    assert layout == ((4, 8, 8), 4, 2, 2, None, 1, None, (5, 6), 0) and layout.condition_shape == (5, 6)


def test_the_golden_files_config_is_checked_and_laid_out():
    config = golden_config("mmdit")
    assert FAMILY.layout(check_config(config, "a file"))[:3] == ((4, 32, 32), 16, 3)
    assert FAMILY.size_name(check_config(COCO, "a file")) == "MM-DiT-COCO"


@pytest.mark.parametrize("change", [{"qk_norm": "rms"}, {"pooled_text": True}, {"heads_of": 3}])
def test_models_of_other_kinds_are_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        build_model({**TINY, **change})


@pytest.mark.parametrize(("name", "value"), [("num_heads", 5), ("context_width", 0), ("patch_size", 3), ("depth", 0)])
def test_sizes_that_do_not_fit_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=name if name != "num_heads" else "hidden_size"):
        build_model({**TINY, name: value})


def test_weights_alone_tell_the_config():
    with torch.device("meta"):
        model = build_model(COCO, z_dims=[768])
    found = infer_config(CheckpointFile(model.state_dict()))
    assert found == {**COCO, "encoder_depth": 8, "projector_dim": 2048}


def test_flops_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    for config in (TINY, {**COCO, "depth": 2}):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            layout, model = FAMILY.layout(config), build_model(config)
            model(torch.zeros(1, *layout.input_shape), torch.zeros(1), torch.zeros(1, *layout.condition_shape))
        embedding_of_time = 2 * (256 + config["hidden_size"]) * config["hidden_size"]
        final_modulation = 2 * 2 * config["hidden_size"] ** 2
        counted = counter.get_total_flops() - embedding_of_time - final_modulation
        assert FAMILY.training_flops(config) == 3 * counted


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"model": "MM-DiT-Digits", "data_dir": "somewhere", "encoder_depth": 4, **changes})


def data(text=None) -> SimpleNamespace:
    return SimpleNamespace(input_size=8, channels=1, num_classes=10, text=text)


def test_a_run_s_model_takes_the_features_of_its_data():
    config = new_config(settings(), data(SimpleNamespace(tokens=9, width=12)))
    assert (config["family"], config["context_tokens"], config["context_width"], config["input_size"]) == (
        "mmdit",
        9,
        12,
        8,
    )


@pytest.mark.parametrize(
    ("changes", "text", "flag"),
    [
        ({}, None, "--data-dir must hold captions"),
        ({"qk_norm": True}, SimpleNamespace(tokens=9, width=12), "--qk-norm"),
        ({"patch_size": 3}, SimpleNamespace(tokens=9, width=12), "--patch-size"),
        ({"model": "SiT-Digits/2"}, SimpleNamespace(tokens=9, width=12), "--model must be conditioned on text"),
    ],
)
def test_data_and_settings_that_do_not_fit_are_refused(changes, text, flag):
    with pytest.raises(UserError, match=flag):
        new_config(settings(**changes), data(text))


def test_another_encoder_s_model_is_no_start():
    with pytest.raises(UserError, match="--data-dir must have text features of width 7"):
        FAMILY.check_start(TINY, {**TINY, "context_width": 7})
