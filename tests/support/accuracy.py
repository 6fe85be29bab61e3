"""How accuracy is judged: against the definition in float64, with eager code of the same type as the yardstick."""

from __future__ import annotations

import torch

# max|out − ref| ≤ 2·max|eager − ref| + rounding of the output type
EAGER_FACTOR = 2.0


def assert_as_accurate_as_eager(
    out: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor, what: str, working_type: torch.dtype | None = None
) -> None:
    """`out` lies as near to `reference` (float64) as the eager result, up to the factor and one rounding.

    `working_type` is the type whose rounding is allowed, by default that of `out`.
    """
    assert out.shape == reference.shape, f"{what}: shape {tuple(out.shape)}, must be {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    assert torch.isfinite(out).all() or not torch.isfinite(reference).all(), (
        f"{what}: not finite where the definition is"
    )
    eps = torch.finfo(working_type or out.dtype).eps
    ours = (out.double() - reference).abs().max().item()
    eager_error = (eager.double() - reference).abs().max().item()
    allowed = EAGER_FACTOR * eager_error + eps * max(reference.abs().max().item(), torch.finfo(torch.float16).tiny)
    print(f"{what}: error {ours:.2e}, eager {eager_error:.2e}, ratio {ours / max(eager_error, 1e-300):.2f}")
    assert ours <= allowed, (
        f"{what}: error {ours:.3e} exceeds {allowed:.3e} (eager in the same type: {eager_error:.3e})"
    )
