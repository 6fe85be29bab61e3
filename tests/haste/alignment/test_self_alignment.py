"""Alignment of a model with its own EMA (SRA): loss, head, times and tokens against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from haste import transport
from haste.alignment.self_alignment import SelfAligner, self_alignment_loss
from haste.diffusion import add_noise
from haste.models import ModelOutput, build_model, get_family
from haste.models.layers import build_projector

SIZE = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2}
FAMILIES = {
    "sit": {**SIZE, "num_classes": 10},
    "dit": {**SIZE, "num_classes": 10},
    "mmdit": {**SIZE, "context_tokens": 3, "context_width": 6},
}


def aligner(depth=3, path="linear", seed=0):
    return SelfAligner(0.2, depth, 16, path, seed)


def definition(student, teacher):
    terms = []
    for a, b in zip(student.double().flatten().tolist(), teacher.double().flatten().tolist(), strict=True):
        distance = abs(a - b)
        terms.append(distance**2 / (2 * 0.05) if distance < 0.05 else distance - 0.05 / 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_the_definition(dtype):
    torch.manual_seed(0)
    student, teacher = (0.1 * torch.randn(2, 4, 5).to(dtype) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = self_alignment_loss(student, teacher)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(definition(student, teacher), rel=1e-12 if dtype == torch.float64 else 1e-6)
    own = aligner()
    total, losses = own(ModelOutput(student, [], [student]), torch.empty(0), [_Tokens(teacher)])
    assert total.item() == pytest.approx(0.2 * losses.itself.item()) and losses.attention is losses.feature is None
    assert losses.itself.item() == found.item()


class _Tokens:
    def __init__(self, tokens):
        self.patch_tokens = tokens


def test_the_head_is_two_layers_of_which_the_hidden_one_is_twice_as_wide():
    head = build_projector(3, 2048, 3, "sra").double()
    first, _, second = head
    assert first.weight.shape == (6, 3) and second.weight.shape == (3, 6)
    tokens = torch.randn(2, 4, 3, dtype=torch.float64)
    hidden = (tokens @ first.weight.T + first.bias).detach().numpy()
    expected = (hidden / (1 + np.exp(-hidden))) @ second.weight.detach().numpy().T + second.bias.detach().numpy()
    np.testing.assert_allclose(head(tokens).detach().numpy(), expected, rtol=1e-12)


def test_times_are_less_noisy_by_up_to_a_fifth():
    t = torch.rand(4000, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    earlier = aligner().less_noisy(get_family("sit"), t, step=7)
    assert torch.equal(torch.get_rng_state(), before) and earlier.dtype == t.dtype
    shift = (t - earlier)[t > 0.2]
    assert shift.min() >= 0 and shift.max() < 0.2 + 1e-6 and earlier.min() == 0
    assert shift.mean().item() == pytest.approx(0.1, abs=0.005)
    assert shift.std().item() == pytest.approx(0.2 / 12**0.5, abs=0.003)  # of a uniform distribution
    assert torch.equal(earlier, aligner().less_noisy(get_family("sit"), t, step=7))
    for other in (aligner(seed=1).less_noisy(get_family("sit"), t, 7), aligner().less_noisy(get_family("sit"), t, 8)):
        assert not torch.equal(earlier, other)


def test_dits_times_stay_whole():
    t = torch.arange(1000).repeat(10)
    earlier = aligner().less_noisy(get_family("dit"), t, step=0)
    shift = t - earlier
    assert earlier.dtype == torch.int64 and earlier.min() == 0
    assert shift[t >= 200].unique().tolist() == list(range(200))  # as randint(0, 200) of the public code


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_emas_tokens_are_those_of_the_block_at_that_time(family, depth):
    torch.manual_seed(0)
    model = build_model({"family": family, **FAMILIES[family]})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    after = []
    model.blocks[depth - 1].register_forward_hook(lambda _, __, out: after.append(out[family == "mmdit"]))
    x, noise = torch.rand(2, 2, 1, 8, 8)
    t = torch.tensor([100, 900]) if family == "dit" else torch.tensor([0.2, 0.7])
    condition = torch.rand(2, 3, 6) if family == "mmdit" else torch.tensor([1, 10])
    (output,) = aligner(depth, "cosine").ema_outputs(model, x, noise, t, condition)
    x_t = add_noise(x, noise, t) if family == "dit" else transport.interpolate(x, noise, t, "cosine")[0]
    model(x_t, t, condition)
    assert output.patch_tokens.shape == (2, 16, 16) and not output.patch_tokens.requires_grad
    assert torch.equal(output.patch_tokens, after[0]) and torch.equal(after[0], after[1])
