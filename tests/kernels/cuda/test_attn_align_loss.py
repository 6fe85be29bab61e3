"""attn_align_loss on CUDA, emulated: against the definition in float64, wherever its operands lie."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from attn_align_problems import (
    NAMES,
    backward,
    check,
    check_infinite_operand,
    definition,
    forward,
    operands,
    operands_types_and_losses,
)

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", (1, 17, 64, 65, 100))
def test_any_number_of_tokens(emulator, dtype, tokens):
    check(emulator, operands(dtype, tokens=tokens), seed=tokens)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dims", ((8, 32), (32, 8), (40, 64), (64, 72), (96, 40), (128, 128), (1, 20), (121, 5)))
def test_any_head_dims(emulator, dtype, dims):
    check(emulator, operands(dtype, heads=(1, 1), tokens=70, dims=dims))


@pytest.mark.parametrize("dtype", TYPES)
def test_near_convergence(emulator, dtype):
    """The student within 1 % of its teacher: the gradient is a small difference of two maps."""
    q, k, noise_q, noise_k = operands(torch.float32, dims=(64, 64), tokens=65)
    student = [(q + 0.01 * noise_q).to(dtype), (k + 0.01 * noise_k).to(dtype)]
    check(emulator, [*student, q.to(dtype), k.to(dtype)])


@pytest.mark.parametrize("dtype", TYPES)
def test_batch_heads_and_scales(emulator, dtype):
    """Two of three student heads take part; a scale may be negative."""
    check(emulator, operands(dtype, batch=2, heads=(3, 2), tokens=20, dims=(40, 24)), scales=(-0.3, 0.5))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_a_row_of_logits_has_in_common_costs_the_loss_no_digits(emulator, dtype):
    """All logits of a row lie some 100 away from 0, of which neither map knows; the maps are almost the same."""
    q, k, noise_q, noise_k = operands(torch.float32, tokens=100, dims=(64, 64))
    tensors = [(x + 4).to(dtype) for x in (q + 0.01 * noise_q, k + 0.01 * noise_k, q, k)]
    exact, _, _ = definition([x.double() for x in tensors], torch.ones(1, 2, 100), (None, None))
    eager, _, _ = definition(tensors, torch.ones(1, 2, 100), (None, None))
    ours, student_softmax, _ = forward(emulator, tensors)
    assert student_softmax[..., 0].min() > 50
    assert_as_accurate_as_eager(ours, eager, exact, f"loss {dtype}", 1.0)


# Blocks that end within a tile, with it, and past the last token; rows and tiles of the kernels are 32 and 64.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "causal"), ((2, 1), (70, 1), (100, 7), (140, 64), (150, 100), (40, 41)))
def test_a_causal_mask_by_blocks(emulator, dtype, tokens, causal):
    divergence = "kl" if causal % 2 else "cross_entropy"
    grad_out = torch.randn(1, 2, tokens, generator=torch.Generator().manual_seed(1))
    check(emulator, operands(dtype, tokens=tokens, dims=(40, 24)), grad_out, causal=causal, divergence=divergence)


@pytest.mark.parametrize("dtype", TYPES)
def test_divergence_over_several_tiles(emulator, dtype):
    check(emulator, operands(dtype, tokens=150), divergence="kl")


@pytest.mark.parametrize("dtype", TYPES)
def test_a_student_that_has_converged_reads_zero(emulator, dtype):
    student = operands(dtype, tokens=100, dims=(64, 64))[:2]
    assert not forward(emulator, [*student, *student], divergence="kl")[0].any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scales", ((9.0, -15.0), (300.0, 200.0)))
def test_logits_beyond_a_plain_exponential(emulator, dtype, scales):
    """e^logit overflows, and one float for a log-sum-exp would lose what the smaller logits add to it."""
    tensors = operands(dtype, tokens=40, dims=(40, 24))
    _, student_softmax, _ = forward(emulator, tensors, scales)
    assert student_softmax[..., 0].max() > 128  # powers of 2
    check(emulator, tensors, torch.ones(1, 2, 40), scales)


@pytest.mark.parametrize("size", (2.0**40, 2.0**63, 2.0**127))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logits_beyond_float_give_no_nan(emulator, dtype, size):
    """Where all products have one sign, so that no sum of them is ∞ − ∞; equal keys share a row's attention."""
    tensors = [torch.full((1, 1, 20, 16), size, dtype=dtype) for _ in NAMES]
    loss, _, _ = forward(emulator, tensors)
    gradients = backward(emulator, tensors, torch.full((1, 1, 20), 1e-30))
    assert torch.allclose(loss, torch.tensor(20.0).log())
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize(("operand", "dtype", "kind"), operands_types_and_losses(TYPES))
def test_an_infinite_operand_shows(emulator, operand, dtype, kind):
    """In the first, a middle and the last token, of either sign; operands are numbered as in NAMES."""
    tensors = operands(dtype, heads=(4, 4), tokens=70, dims=(24, 16))
    check_infinite_operand(emulator, tensors, operand, {0: torch.inf, 33: -torch.inf, 69: torch.inf}, divergence=kind)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("operand", range(4), ids=NAMES)
def test_an_infinite_operand_shows_under_a_causal_mask(emulator, operand, dtype):
    """To the queries that see it, and to no other."""
    tensors = operands(dtype, tokens=70, dims=(24, 16))
    check_infinite_operand(emulator, tensors, operand, {30: torch.inf}, causal=16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_beside_an_infinite_query_products_beyond_float_stay_finite(emulator, dtype):
    tensors = [torch.full((1, 1, 20, 16), 2.0**80, dtype=dtype) for _ in NAMES]
    tensors[2][0, 0, 7, 3] = torch.inf
    loss, _, _ = forward(emulator, tensors)
    others = torch.arange(20) != 7
    assert loss[0, 0, 7].isnan() and torch.allclose(loss[..., others], torch.tensor(20.0).log())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("odd", ("start", "batch", "head", "token"))
def test_unaligned_operands(emulator, dtype, odd):
    """The first element, or one stride of the three, off the 16-byte boundary: no vector access may touch them."""
    unaligned = []
    for x in operands(dtype, batch=2, tokens=9, dims=(40, 24)):
        batch, heads, tokens, dim = x.shape
        token_stride = dim + (odd == "token")
        head_stride = -(-tokens * token_stride // 8) * 8 + (odd == "head")
        batch_stride = -(-heads * head_stride // 8) * 8 + (odd == "batch")
        room = torch.zeros(batch * batch_stride + 1, dtype=dtype)
        view = room.as_strided(x.shape, (batch_stride, head_stride, token_stride, 1), int(odd == "start"))
        unaligned.append(view.copy_(x))
    check(emulator, unaligned)


@pytest.mark.parametrize("dtype", TYPES)
def test_grad_out_of_every_row(emulator, dtype):
    """Rows of very different, and of no, weight, laid out either way."""
    tensors = operands(dtype, batch=2, heads=(1, 1), tokens=70, dims=(32, 40))
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(2, 1, 70, generator=generator) * torch.logspace(-8, 0, 70)
    grad_out[:, :, ::7] = 0
    check(emulator, tensors, grad_out)
    check(emulator, tensors, (grad_out.mT.contiguous() * 1e-3).mT)


def test_no_grad_out_gives_zeros(emulator):
    tensors = operands(torch.float16, tokens=20)
    gradients = backward(emulator, tensors, torch.zeros(1, 2, 20))
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", TYPES)
def test_only_the_wanted_gradient(emulator, dtype):
    """Each alone is what both together give, to the bit, whatever the order of the threads."""
    tensors = operands(dtype, tokens=40)
    grad_out = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(2))
    both = backward(emulator, tensors, grad_out)
    for seed, name in enumerate(both, start=1):
        alone = backward(emulator, tensors, grad_out, seed=seed, wanted=(name,))
        assert torch.equal(alone[name], both[name])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", (0, 1))
def test_gradients_go_where_they_are_told(emulator, dtype, offset):
    """Into views of one packed tensor, aligned or not; its other elements stay as they were."""
    tensors = operands(dtype, tokens=20, dims=(40, 24))
    grad_out = torch.rand(1, 2, 20, generator=torch.Generator().manual_seed(3))
    room = torch.full((20 * 3 * 2 * 40 + offset,), 7.0, dtype=dtype)
    packed = room[offset:].view(1, 20, 3, 2, 40).permute(2, 0, 3, 1, 4)
    views = {"grad_q": packed[0], "grad_k": packed[1]}
    written = backward(emulator, tensors, grad_out, destinations=views)
    expected = backward(emulator, tensors, grad_out)
    for name in views:
        assert torch.equal(written[name], expected[name])
    everything = written["grad_q"].as_strided(room.shape, (1,), 0)[offset:].view(1, 20, 3, 2, 40)
    assert (everything[:, :, 1:] == 7).all()


@pytest.mark.parametrize("shape", ((0, 2, 5), (2, 0, 5), (2, 2, 0)))
def test_nothing_to_do(emulator, shape):
    batch, heads, tokens = shape
    tensors = operands(torch.float32, batch, (heads, heads), tokens)
    assert forward(emulator, tensors)[0].shape == shape
    assert backward(emulator, tensors, torch.zeros(shape))["grad_k"].shape == (*shape, 72)


def test_refusals(emulator):
    with pytest.raises(emulator.Refused, match="not float64"):
        forward(emulator, operands(torch.float64))
    with pytest.raises(emulator.Refused, match="head dims of 1 to 128"):
        forward(emulator, operands(torch.float16, dims=(129, 64)))
