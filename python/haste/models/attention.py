"""softmax(q·kᵀ·d^−½)·v by whichever implementation is chosen; q, k and v are (B, H, N, D), and so is the result."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from haste.errors import UserError


def step_by_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the map in memory."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package flash-attn: CUDA, fp16 and bf16."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package xformers."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,
    "flash-attn": flash_attn,
    "xformers": xformers,
    "plain": step_by_step,
}

PACKAGES = {"flash-attn": "flash_attn", "xformers": "xformers"}


def check_backend(name: str) -> None:
    """UserError if its package is not installed."""
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        instead = f"pip install {name}, or --attention sdpa"
        raise UserError(f"--attention is {name}, and the package {package} is not installed; {instead}")
