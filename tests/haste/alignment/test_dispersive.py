"""Dispersive Loss against its definition, pair by pair in float64, and the tokens that it reads in every family."""

from __future__ import annotations

import math

import pytest
import torch
from haste.alignment.dispersive import dispersive_loss
from haste.errors import UserError
from haste.models import build_model

SIZE = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2}
FAMILIES = {
    "sit": {**SIZE, "num_classes": 10},
    "dit": {**SIZE, "num_classes": 10},
    "mmdit": {**SIZE, "context_tokens": 3, "context_width": 6},
    "xar": {"width": 16, "heads": 2, "encoder_depth": 2, "decoder_depth": 1, "channels": 1, "grid": 4, "patch_size": 2,
            "entity": "scale", "num_classes": 10},
}  # fmt: skip


def drawn(*shape, scale=1.0, offset=0.0):
    return offset + scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def definition(tokens, tau):
    images = [image.double().flatten() for image in tokens]
    terms = [math.exp(-(a - b).square().mean().item() / tau) for a in images for b in images]
    return math.log(sum(terms) / len(terms))


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("batch", [2, 5])
def test_it_is_the_definition(batch, tau):
    tokens = drawn(batch, 4, 3)
    assert dispersive_loss(tokens, tau).item() == pytest.approx(definition(tokens, tau), abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: dispersive_loss(z, tau), tokens.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_common_offset_and_half_precision_cost_no_accuracy(dtype):
    tokens = drawn(6, 16, 8, scale=0.5, offset=20.0).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # whose products would lose what is small beside the offset
        found = dispersive_loss(tokens)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(definition(tokens, 1.0), abs=1e-4)


def test_images_that_are_far_apart_and_images_that_are_the_same():
    far = dispersive_loss(1e4 * drawn(4, 4, 3))
    assert far.item() == pytest.approx(-math.log(4))  # each is alone with itself
    same = drawn(1, 4, 3).expand(4, 4, 3).clone().requires_grad_()
    loss = dispersive_loss(same)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-12


def test_one_image_has_no_other():
    with pytest.raises(UserError, match="--batch-size must be at least 2 .* --disp-coeff"):
        dispersive_loss(drawn(1, 4, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_returns_the_images_tokens_after_the_block(family):
    torch.manual_seed(0)
    model = build_model({"family": family, **FAMILIES[family]}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    after = []
    model.blocks[1].register_forward_hook(lambda _, __, out: after.append(out[family == "mmdit"]))
    x, t = torch.rand(2, 1, 8, 8), torch.tensor([100, 900]) if family == "dit" else torch.tensor([0.2, 0.7])
    if family == "xar":
        x = model.entities.split(x)
    condition = torch.rand(2, 3, 6) if family == "mmdit" else torch.tensor([1, 2])
    output = model(x, t, condition, tokens_after=2)
    assert torch.equal(output.tokens, after[0][:, -16:]) and output.tokens.shape == (2, 16, 16)
    plain = model(x, t, condition)
    assert plain.tokens is None and torch.equal(plain.prediction, output.prediction)
    with pytest.raises(ValueError, match="tokens_after must be from 1 to 3, or 0 for none, got 4"):
        model(x, t, condition, tokens_after=4)
