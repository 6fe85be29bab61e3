"""Checks the haste_ext that this interpreter has installed, under the torch that it has: python check_installed.py

Every operation in float32 and bfloat16: values and gradients near the definition's in float64, torch.library.opcheck,
and torch.compile without a graph break. The last line printed is JSON: build_info() and what passed.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

import haste_ext
from haste_ext import reference

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


SNAPSHOTS, WEIGHTS, GATES, RESIDUAL = random(3, 4, 2, 9, 40), random(4), random(3, 2, 40), random(2, 9, 40)
# For each operation its operands; the first of them, so many, get gradients; and those that are always float32.
OPERATIONS = {
    "attn_align_loss": ([random(2, 3, 33, dim) for dim in (72, 72, 64, 64)], 2, ()),
    "token_cosine_loss": ([random(2, 17, 96), random(2, 17, 96)], 1, ()),
    "taylor_extrapolate": ([SNAPSHOTS[0], WEIGHTS, RESIDUAL, GATES[0]], 0, (1,)),
    "taylor_extrapolate_blocks": ([SNAPSHOTS, WEIGHTS, GATES, RESIDUAL], 0, (1,)),
    "taylor_extrapolate_steps": ([SNAPSHOTS, random(2, 4), random(2, 3, 2, 40)], 0, (1,)),
}


def results(function, operands: list[Tensor], differentiable: int) -> list[Tensor]:
    """The value, then the gradients of the first operands."""
    inputs = [x.detach().requires_grad_(i < differentiable) for i, x in enumerate(operands)]
    value = function(*inputs)
    if differentiable:
        value.backward()
    return [value.detach(), *(x.grad for x in inputs[:differentiable])]


def check(name: str) -> None:
    operands, differentiable, always_float32 = OPERATIONS[name]
    operation, definition = getattr(haste_ext, name), getattr(reference, name)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x if i in always_float32 else x.to(dtype) for i, x in enumerate(operands)]
        ours = results(operation, inputs, differentiable)
        exact = results(definition, [x.double() for x in inputs], differentiable)
        for mine, value in zip(ours, exact, strict=True):
            tolerance = 8 * max(torch.finfo(mine.dtype).eps, 1e-6) * value.abs().max().item()
            torch.testing.assert_close(mine.double(), value, rtol=0, atol=tolerance)

    inputs = [x.detach().requires_grad_(i < differentiable) for i, x in enumerate(operands)]
    torch.library.opcheck(getattr(torch.ops.haste, name).default, tuple(inputs))
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend="aot_eager")
    for mine, value in zip(*(results(f, operands, differentiable) for f in (compiled, operation)), strict=True):
        assert torch.equal(mine, value), f"{name}: compiled and eager differ"


if __name__ == "__main__":
    for name in OPERATIONS:
        check(name)
    print(json.dumps({**haste_ext.build_info(), "passed": list(OPERATIONS)}))
