"""What the operations share: refusals, the nodes of torch's graph, and how both are put behind ``torch.ops.haste``.

Each loss is one torch.autograd.Function behind the Autograd key of its operation, rows and reduction together: the
formulas of torch.library.register_autograd take several times as long per call, and the gradient of a mean of rows
would be a tensor of equal numbers, written and read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from haste_ext import _load
from haste_ext._load import (
    argument_names,
    below_autograd,
    forward_mode_is_active,
    functorch_is_active,
    is_differentiated_by_functorch,
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")


def check_tensor(name: str, value: object, dim: int | None = None, layout: str = "") -> None:
    """A floating-point tensor of `dim` dimensions (any if None), on a device that this build serves."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_mkldnn:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a plain tensor with strides, got {kind}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
    if value.device.type == "cuda":
        if missing := _load._C.missing_cuda():
            raise RuntimeError(f"{name} is on {value.device}: {missing}")
        if value.dtype == torch.float64:
            raise TypeError(f"{name} must be float32, float16 or bfloat16 on {value.device}, got torch.float64")
    elif value.device.type not in ("cpu", "meta"):
        raise ValueError(f"{name} must be on a cpu or cuda device, got {value.device}")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(value.shape)}")
    refuse_transforms(**{name: value})


def refuse_transforms(**tensors: Tensor | None) -> bool:
    """Transforms that go by the operations' autograd formulas: torch answers some of them with a gradient of zero.

    Returns whether anything at all stands between the caller and the kernels but autograd: torch.compile, vmap.
    """
    if torch.compiler.is_compiling():
        return True
    under_functorch = functorch_is_active()
    forward_mode = forward_mode_is_active()
    for name, value in tensors.items() if under_functorch or forward_mode else ():
        if not isinstance(value, Tensor):
            continue
        if under_functorch and is_differentiated_by_functorch(value):
            raise NotImplementedError(
                f"{name} is under a transform of torch.func; of those only vmap is served: take torch.autograd.grad "
                "or backward()"
            )
        if forward_mode and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent; only reverse mode is served: take torch.autograd.grad or "
                "backward()"
            )
    return under_functorch


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *attributes: str) -> None:
    """`value` agrees with `other` in each of the attributes: shape, dtype, device."""
    for attribute in attributes:
        was, must_be = getattr(value, attribute), getattr(other, attribute)
        if was != must_be:
            was, must_be = (tuple(was), tuple(must_be)) if attribute == "shape" else (was, must_be)
            raise_as = TypeError if attribute == "dtype" else ValueError
            raise raise_as(f"{name} must have the {attribute} of {other_name}, {must_be}, got {was}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def check_reduction(reduction: object) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_int(name: str, value: object, low: int, high: int, what_high_is: str) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, {what_high_is}, got {value}")


def check_scale(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, (int, float, torch.SymFloat)) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number that a float can hold, got an int of {value.bit_length()} bits")


def refusal_of(check: Callable[..., None], arguments: tuple, error: Exception) -> Exception:
    """The sentence in which `check` refuses the arguments; the error itself if it finds no fault with them."""
    try:
        check(*arguments)
    except (TypeError, ValueError, RuntimeError) as refusal:
        return refusal
    return error


def check_devices(**tensors: Tensor | None) -> None:
    """All on the device of the first. For fake kernels: torch sends a call there as soon as one argument is a meta
    tensor, and memory that they allocated on the device of another would come back as it is."""
    (first_name, first), *others = tensors.items()
    for name, value in others:
        if value is not None:
            check_same(name, value, first_name, first, "device")


def implement_autograd(operation: str, implementation: Callable[..., object]) -> None:
    """Puts `implementation` behind the operation's Autograd key, for torch.ops' own form, and with it the refusal of
    transforms, which would otherwise be answered with tangents of zero."""
    overload = getattr(torch.ops.haste, operation).default
    names = argument_names(overload)

    def checked(*arguments):
        refuse_transforms(**dict(zip(names, arguments, strict=False)))
        return implementation(*arguments)

    torch.library.impl(f"haste::{operation}", "Autograd")(checked)


def refuse_gradient(operation: str, advice: str) -> None:
    """Make the backward of an operation without gradients raise NotImplementedError, with advice."""
    overload = getattr(torch.ops.haste, operation).default

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with below_autograd():
                return overload(*arguments)

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"haste::{operation} has no gradient: {advice}")

    def implementation(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return NoGradient.apply(*arguments)
        with below_autograd():
            return overload(*arguments)

    implement_autograd(operation, implementation)


def below_autograd_in_backward() -> AbstractContextManager:
    """`below_autograd` in a backward; but not with create_graph=True, where the operations raise, nor under
    torch.compile, which does not trace this context."""
    return nullcontext() if torch.is_grad_enabled() or torch.compiler.is_compiling() else below_autograd()


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """mean, sum or none of the per-row losses, in their own type."""
    if reduction == "mean":
        return rows.mean()
    return rows.sum() if reduction == "sum" else rows


def grad_out_of_rows(grad: Tensor, rows: torch.Size, reduction: str) -> Tensor:
    """The gradient of every row, given that of the reduced loss: for "mean" and "sum" one number with strides of 0."""
    if reduction == "none":
        return grad
    return (grad / rows.numel() if reduction == "mean" else grad).expand(rows)
