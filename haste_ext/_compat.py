"""Every private name of torch that this package uses, in one place: what to look at when a new torch comes.

The compiled module has one more: ``aoti_torch_get_current_cuda_stream`` in csrc/ops/common.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# Flash attention by itself, with the log-sum-exp that scaled_dot_product_attention keeps to itself.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def below_autograd() -> AbstractContextManager:
    """Calls under it go to the kernels at once, whatever their operands require."""
    return torch._C._AutoDispatchBelowAutograd()


def is_differentiated_by_functorch(value: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(value):
        value = functorch.get_unwrapped(value)
    return functorch.is_gradtrackingtensor(value)


def forward_mode_is_active() -> bool:
    return forward_ad._current_level >= 0


def argument_names(overload: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in overload._schema.arguments]


def create_cuda_function(code: str) -> Callable[..., Tensor]:
    """An elementwise CUDA function, compiled from its source at run time; RuntimeError where it cannot be."""
    return torch.cuda.jiterator._create_jit_fn(code)
