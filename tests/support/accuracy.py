"""How accuracy is judged: against the definition in float64, with eager code of the same type as the yardstick."""

from __future__ import annotations

import torch

# max|out − ref| ≤ 2·max|eager − ref| + rounding of the output type
EAGER_FACTOR = 2.0


def assert_as_accurate_as_eager(
    out: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor, what: str, terms: float = 0.0
) -> None:
    """`out` lies as near to `reference` (float64) as the eager result, up to the factor and one rounding.

    The rounding is that of the largest value; where all values cancel to nothing (a single key, a single dimension),
    that of the `terms` which cancel. float64 is its own reference: there only roundings are allowed.
    """
    assert out.shape == reference.shape, f"{what}: shape {tuple(out.shape)}, must be {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    assert torch.isfinite(out).all() or not torch.isfinite(reference).all(), f"{what}: not finite where it must be"
    eps, largest = torch.finfo(out.dtype).eps, reference.abs().max().item()
    ours, yardstick = ((x.double() - reference).abs().max().item() for x in (out, eager))
    rounding = eps * (largest if largest > eps * terms else terms)
    if out.dtype == torch.float64:
        rounding = 100 * eps * max(largest, terms)
    print(f"{what}: error {ours:.2e}, eager {yardstick:.2e}, ratio {ours / max(yardstick, 1e-300):.2f}")
    allowed = EAGER_FACTOR * yardstick + rounding
    assert ours <= allowed, f"{what}: error {ours:.3e} exceeds {allowed:.3e} (eager in the same type: {yardstick:.3e})"
