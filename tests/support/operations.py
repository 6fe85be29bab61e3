"""The operations in one form, for tests of what all of them must do as torch operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import haste_ext
from haste_ext import reference


@dataclass(frozen=True)
class Operation:
    """One operation with its definition; the first operands, `differentiable` of them, get gradients."""

    name: str
    differentiable: int
    shapes: Callable[[int, int, int], list[tuple[int, ...]]]  # batch, tokens, dim → of each operand
    always_float32: int | None = None  # the operand whose type is fixed

    def __str__(self) -> str:
        return self.name

    @property
    def ours(self) -> Callable[..., Tensor]:
        return getattr(haste_ext, self.name)

    @property
    def definition(self) -> Callable[..., Tensor]:
        return getattr(reference, self.name)

    def operands(self, device="cpu", dtype=torch.float32, batch=2, tokens=9, dim=16, seed=0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator) for shape in self.shapes(batch, tokens, dim)]
        return [x.to(device, None if i == self.always_float32 else dtype) for i, x in enumerate(values)]

    def results(self, function: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
        """The value of the function and, where the operation has them, the gradients of its sum."""
        inputs = [x.detach().requires_grad_(i < self.differentiable) for i, x in enumerate(operands)]
        value = function(*inputs)
        if not self.differentiable:
            return [value]
        return [value.detach(), *torch.autograd.grad(value.sum(), inputs[: self.differentiable])]


ATTN_ALIGN_LOSS = Operation("attn_align_loss", 2, lambda b, n, d: [(b, 3, n, d)] * 4)
TOKEN_COSINE_LOSS = Operation("token_cosine_loss", 1, lambda b, n, d: [(b, n, d)] * 2)
TAYLOR_EXTRAPOLATE = Operation(
    "taylor_extrapolate", 0, lambda b, n, d: [(4, b, n, d), (4,), (b, n, d), (b, d)], always_float32=1
)
TAYLOR_EXTRAPOLATE_BLOCKS = Operation(
    "taylor_extrapolate_blocks", 0, lambda b, n, d: [(3, 4, b, n, d), (4,), (3, b, d), (b, n, d)], always_float32=1
)
TAYLOR_EXTRAPOLATE_STEPS = Operation(
    "taylor_extrapolate_steps", 0, lambda b, n, d: [(3, 4, b, n, d), (2, 4), (2, 3, b, d)], always_float32=1
)
TAYLOR_OPERATIONS = (TAYLOR_EXTRAPOLATE, TAYLOR_EXTRAPOLATE_BLOCKS, TAYLOR_EXTRAPOLATE_STEPS)
OPERATIONS = (ATTN_ALIGN_LOSS, TOKEN_COSINE_LOSS, *TAYLOR_OPERATIONS)
LOSSES = (ATTN_ALIGN_LOSS, TOKEN_COSINE_LOSS)
