"""What the losses share as nodes of torch's graph, made to cost as little of the host's time as any such node.

Each loss is one torch.autograd.Function behind the Autograd key of its operation, rows and reduction together: the
formulas of torch.library.register_autograd take several times as long per call, and the gradient of a mean of rows
would be a tensor of equal numbers, written and read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def below_autograd() -> AbstractContextManager:
    """Calls under it go to the kernels at once, whatever their operands require."""
    return torch._C._AutoDispatchBelowAutograd()


def below_autograd_in_backward() -> AbstractContextManager:
    """Not where a graph of the backward is asked for: there the operations say that it cannot be had. Nor where torch
    compiles it: it knows no such context, and needs none."""
    return nullcontext() if torch.is_grad_enabled() or torch.compiler.is_compiling() else below_autograd()


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """mean, sum or none of the per-row losses, in their own type."""
    if reduction == "mean":
        return rows.mean()
    return rows.sum() if reduction == "sum" else rows


def upstream_of_rows(grad: Tensor, rows: torch.Size, reduction: str) -> Tensor:
    """The gradient of every row, given that of the reduced loss: for "mean" and "sum" one number with strides of 0."""
    if reduction == "none":
        return grad
    return (grad / rows.numel() if reduction == "mean" else grad).expand(rows)
