"""Asserts the rule of accuracy, which stands in haste_ext.bench.compare."""

from __future__ import annotations

from dataclasses import replace

import torch

from haste_ext.bench.compare import measure_accuracy


def assert_as_accurate_as_eager(
    out: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor, what: str, terms: float = 0.0, few: bool = False
) -> None:
    """`out` lies as near to `reference` (float64) as the eager result, up to the factor and one rounding.

    terms: see measure_accuracy. few: the result has so few numbers that the eager one's may all be near by luck, where
    terms almost cancel: then one rounding of the terms is allowed.
    """
    assert out.shape == reference.shape, f"{what}: shape {tuple(out.shape)}, must be {tuple(reference.shape)}"
    assert torch.isfinite(out).all() or not torch.isfinite(reference).all(), f"{what}: not finite where it must be"
    found = measure_accuracy(out, eager, reference, terms)
    if few:
        found = replace(found, allowed=max(found.allowed, 2 * found.eager_error + torch.finfo(out.dtype).eps * terms))
    errors = f"error {found.error:.3e}, eager in the same type {found.eager_error:.3e}, allowed {found.allowed:.3e}"
    print(f"{what}: {errors}, ratio {found.error / max(found.eager_error, 1e-300):.2f}")
    assert found.passed, f"{what}: {errors}"
