"""Every kernel at small and odd shapes, all layouts and types, inputs and eager results made on the CPU.

On a GPU nothing but the operations themselves runs here, so that a sanitizer gets through in a minute.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from operations import (
    ATTN_ALIGN_LOSS,
    OPERATIONS,
    TAYLOR_EXTRAPOLATE,
    TAYLOR_EXTRAPOLATE_BLOCKS,
    TAYLOR_OPERATIONS,
    TOKEN_COSINE_LOSS,
)

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
BF16 = torch.bfloat16


def check(operation, operands, device, **kwargs):
    """Values and gradients near the definition's in float64, both of the operands as they lie on the CPU."""

    def call(function):
        return lambda *inputs: function(*inputs, **kwargs)

    exact = operation.results(call(operation.definition), [x.double() for x in operands])
    working = torch.promote_types(operands[0].dtype, operands[-1].dtype)
    eager = operation.results(call(operation.definition), [x.to(working) for x in operands])
    ours = operation.results(call(operation.ours), [x if device == "cpu" else moved(x, device) for x in operands])
    largest = max((x.abs().max().item() for x in operands if x.numel()), default=0.0)
    for i, (mine, theirs, value) in enumerate(zip(ours, eager, exact, strict=True)):
        what = f"{operation} {'value' if i == 0 else f'gradient {i}'}"
        assert_as_accurate_as_eager(mine.cpu(), theirs, value, what, terms=max(largest, 1.0))


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """On the device with the same strides and offset: `to` would make an expanded tensor whole."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def in_steps(x: torch.Tensor) -> torch.Tensor:
    """Every second entry of each dimension but the last of something larger, one element off its start."""
    larger = torch.zeros([2 * size for size in x.shape[:-1]] + [x.shape[-1] + 1], dtype=x.dtype)
    view = larger[tuple(slice(0, 2 * size, 2) for size in x.shape[:-1]) + (slice(1, None),)]
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "first and second dimension swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "tokens before all": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
    "in steps and misaligned": in_steps,
    "last stride not 1": lambda x: x.mT.contiguous().mT,
    "expanded over the first dimension": lambda x: x[:1].expand_as(x),
    "expanded over the last dimension": lambda x: x[..., :1].expand_as(x),
    "windows that overlap": lambda x: x.contiguous().as_strided(x.shape, (1,) * x.dim()),
    "one value everywhere": lambda x: x[tuple([slice(1)] * x.dim())].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_any_layout(operation, layout, device):
    for dim in (16, 13):
        operands = operation.operands(dtype=BF16, batch=2, tokens=21, dim=dim)
        check(operation, [LAYOUTS[layout](x) if x.dim() > 1 else in_steps(x[None])[0] for x in operands], device)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("tokens", (1, 2, 17, 255, 257))
def test_attn_align_loss_of_any_length(tokens, dtype, device):
    check(ATTN_ALIGN_LOSS, attention(1, 1, tokens, (72, 64), dtype), device)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("dim", (1, 8, 16, 24, 32, 40, 64, 72, 80, 96, 104, 128))
def test_attn_align_loss_of_any_head_dim(dim, dtype, device):
    check(ATTN_ALIGN_LOSS, attention(1, 2, 33, (dim, 136 - dim if dim > 8 else dim), dtype), device)


def test_attn_align_loss_of_a_thousand_tokens(device):
    check(ATTN_ALIGN_LOSS, attention(1, 1, 1000, (72, 64), BF16), device)


@pytest.mark.parametrize("student_type", FLOAT_TYPES)
@pytest.mark.parametrize("teacher_type", FLOAT_TYPES)
def test_attn_align_loss_of_two_types(student_type, teacher_type, device):
    student, teacher = (attention(1, 1, 20, (24, 40), dtype) for dtype in (student_type, teacher_type))
    check(ATTN_ALIGN_LOSS, [*student[:2], *teacher[2:]], device)


@pytest.mark.parametrize("prefix", (0, 1, 5))
def test_attn_align_loss_behind_prefixes(prefix, device):
    student, teacher = attention(2, 2, 70 + prefix, (64, 64), BF16), attention(2, 3, 71, (64, 64), BF16)
    operands = [*student[:2], *teacher[2:]]
    check(ATTN_ALIGN_LOSS, operands, device, student_prefix=prefix, teacher_prefix=1, reduction="none")


@pytest.mark.parametrize(("batch", "heads"), ((0, 1), (1, 0), (0, 0), (1, 1), (3, 1), (1, 3)))
def test_attn_align_loss_of_few_or_no_heads(batch, heads, device):
    check(ATTN_ALIGN_LOSS, attention(batch, heads, 5, (8, 8), BF16), device, reduction="sum")


@pytest.mark.parametrize("student_type", FLOAT_TYPES)
@pytest.mark.parametrize("teacher_type", FLOAT_TYPES)
def test_token_cosine_loss_of_two_types(student_type, teacher_type, device):
    for dim in (1, 7, 40, 264):
        student, teacher = (
            TOKEN_COSINE_LOSS.operands(dtype=t, dim=dim, seed=i) for i, t in enumerate((student_type, teacher_type))
        )
        check(TOKEN_COSINE_LOSS, [student[0], teacher[1]], device, reduction="none")


@pytest.mark.parametrize("operation", (TAYLOR_EXTRAPOLATE, TAYLOR_EXTRAPOLATE_BLOCKS), ids=str)
@pytest.mark.parametrize("snapshot_type", FLOAT_TYPES)
@pytest.mark.parametrize("residual_type", FLOAT_TYPES)
def test_of_two_types(operation, snapshot_type, residual_type, device):
    residual = 2 if operation is TAYLOR_EXTRAPOLATE else 3
    for dim in (1, 7, 40):
        operands = operation.operands(dtype=snapshot_type, dim=dim)
        operands[residual] = operands[residual].to(residual_type)
        check(operation, operands, device)


@pytest.mark.parametrize("operation", (TOKEN_COSINE_LOSS, *TAYLOR_OPERATIONS), ids=str)
@pytest.mark.parametrize(("batch", "tokens"), ((0, 3), (3, 0), (1, 1), (1, 257), (257, 1)))
def test_of_few_or_no_tokens(operation, batch, tokens, device):
    kwargs = {"reduction": "sum"} if operation is TOKEN_COSINE_LOSS else {}
    check(operation, operation.operands(dtype=BF16, batch=batch, tokens=tokens, dim=24), device, **kwargs)


def attention(batch, heads, tokens, dims, dtype):
    """q, k of the student and of the teacher as views of packed projections."""
    generator = torch.Generator().manual_seed(tokens + dims[0])
    operands = []
    for dim in dims:
        packed = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype)
        operands += packed.permute(2, 0, 3, 1, 4)[:2]
    return operands
