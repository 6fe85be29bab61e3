"""Values near the ends of their types: no NaN where the definition in float64 has none, right where floats hold it."""

from __future__ import annotations

import pytest
import torch
from operations import (
    ATTN_ALIGN_LOSS,
    LOSSES,
    OPERATIONS,
    TAYLOR_EXTRAPOLATE,
    TAYLOR_EXTRAPOLATE_BLOCKS,
    TAYLOR_EXTRAPOLATE_STEPS,
    TAYLOR_OPERATIONS,
    TOKEN_COSINE_LOSS,
)

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands_up_to(largest, operation, dtype, **kwargs):
    """Of either sign, the largest of each operand at `largest`; weights, where there are any, as they are."""
    operands = operation.operands(dtype=torch.float64, **kwargs)
    return [
        x if i == operation.always_float32 else (x / x.abs().max() * largest).to(dtype) for i, x in enumerate(operands)
    ]


def results(operation, operands, device):
    """Ours and the definition's in float64, both on the CPU."""
    ours = operation.results(operation.ours, [x.to(device) for x in operands])
    return [x.cpu() for x in ours], operation.results(operation.definition, [x.double() for x in operands])


def assert_close_to_the_largest(ours, exact):
    """Within a few roundings of the largest value, or what a float rounds to zero."""
    for mine, value in zip(ours, exact, strict=True):
        allowed = max(4 * torch.finfo(mine.dtype).eps * value.abs().max().item(), torch.finfo(torch.float32).tiny)
        torch.testing.assert_close(mine.double(), value, rtol=0, atol=allowed)


@pytest.mark.parametrize("fraction", (1.0, 0.1))
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_the_largest_values_of_a_type_give_no_nan(operation, dtype, fraction, device):
    """Logits of 1e77 in bfloat16: float has no such number, and what stands for it must not be a NaN."""
    operands = operands_up_to(fraction * torch.finfo(dtype).max, operation, dtype, tokens=40, dim=72)
    ours, exact = results(operation, operands, device)
    assert all(torch.isfinite(x).all() for x in exact)
    assert not any(torch.isnan(x).any() for x in ours)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_attn_align_loss_where_logits_fit_a_float(dtype, device):
    """Logits to 1e10 in float16, to 1e35 in the others: maps are one-hot, losses and gradients right."""
    largest = min(torch.finfo(dtype).max, 1e17)
    operands = operands_up_to(largest, ATTN_ALIGN_LOSS, dtype, tokens=40, dim=72)
    assert_close_to_the_largest(*results(ATTN_ALIGN_LOSS, operands, device))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_token_cosine_loss_of_the_largest_values(dtype, device):
    """Their squares are no floats, their cosine is an ordinary number."""
    operands = operands_up_to(torch.finfo(dtype).max, TOKEN_COSINE_LOSS, dtype, tokens=40, dim=72)
    (loss, _), (exact, _) = results(TOKEN_COSINE_LOSS, operands, device)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_the_smallest_values_of_a_type(operation, dtype, device):
    """Maps are uniform; cosines are clamped as normalize clamps them."""
    operands = operands_up_to(4 * torch.finfo(dtype).tiny, operation, dtype, tokens=40, dim=72)
    ours, exact = results(operation, operands, device)
    assert_close_to_the_largest(ours[:1], exact[:1])
    assert all(torch.isfinite(x).all() for x in ours)


@pytest.mark.parametrize("operation", TAYLOR_OPERATIONS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_forecast_whose_terms_overflow_where_the_sum_does_not(operation, dtype, device):
    """2·max − 1.5·max in float32 inside; beyond the type it is infinite, as float64 rounded to the type is."""
    largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 8)  # terms of the others must fit a float
    residual = {TAYLOR_EXTRAPOLATE: 2, TAYLOR_EXTRAPOLATE_BLOCKS: 3}.get(operation)
    operands = operation.operands(dtype=dtype)
    operands[0].fill_(largest)
    operands[1].copy_(torch.tensor([2.0, -1.5, 0.25, -0.25]))
    for i in range(2, len(operands)):
        operands[i].fill_(0.0 if i == residual else 1.0)
    layers = 1 if operation is TAYLOR_EXTRAPOLATE else 3
    ours = operation.ours(*(x.to(device) for x in operands)).cpu()
    exact = operation.definition(*(x.double() for x in operands))
    assert (exact == 0.5 * layers * float(operands[0].max())).all()
    assert torch.equal(ours, exact.to(dtype))


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_what_is_not_finite_in_any_operand_shows(operation, dtype, value, device):
    """Where the definition in float64 has no finite number, there is none: neither in the value nor in a gradient."""
    for i, operand in enumerate(operation.operands()):
        for place in {(0,) * operand.dim(), tuple(size - 1 for size in operand.shape)}:
            operands = operation.operands(dtype=dtype)
            operands[i][place] = value
            kwargs = {"reduction": "none"} if operation in LOSSES else {}
            ours = operation.results(lambda *x, k=kwargs: operation.ours(*x, **k), [x.to(device) for x in operands])
            exact = operation.results(
                lambda *x, k=kwargs: operation.definition(*x, **k),
                [x if n == operation.always_float32 else x.double() for n, x in enumerate(operands)],
            )
            assert not exact[0].isfinite().all()
            for mine, definition in zip(ours, exact, strict=True):
                assert not mine.cpu()[~definition.isfinite()].isfinite().any(), f"operand {i} at {place}"


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_value_that_is_no_number_spoils_only_what_depends_on_it(operation, value, device):
    """It is not hidden either: a loss that went wrong grad_out must show."""
    operands = operation.operands(device, batch=3)
    batch = operands[0].dim() - (4 if operation is ATTN_ALIGN_LOSS else 3)
    operands[0].select(batch, 1)[..., -1, -1] = value
    out = operation.ours(*operands, **({"reduction": "none"} if operation in LOSSES else {}))
    out = out[0] if operation is TAYLOR_EXTRAPOLATE_STEPS else out
    assert not torch.isfinite(out[1]).all()
    assert torch.isfinite(out[0]).all() and torch.isfinite(out[2]).all()
