"""The rule by which results are judged: against the definition in float64, with eager code as the yardstick."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# max|out − exact| ≤ 2·max|eager − exact| + rounding of the output type
EAGER_FACTOR = 2.0


@dataclass(frozen=True)
class Judgement:
    """The largest errors of a result and of eager code in the same type, and what the rule allows."""

    error: float
    eager_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def judge(out: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> Judgement:
    """`out` beside `eager`, the same computation in the same type, and `exact`, the definition in float64.

    The rounding is that of the largest value; where all values cancel to nothing (a single key, a single dimension),
    that of the `terms` which cancel. float64 is its own reference: there only roundings are allowed.
    """
    if exact.numel() == 0:
        return Judgement(0.0, 0.0, 0.0)
    eps, largest = torch.finfo(out.dtype).eps, exact.abs().max().item()
    error, eager_error = ((x.double() - exact).abs().max().item() for x in (out, eager))
    rounding = eps * (largest if largest > eps * terms else terms)
    if out.dtype == torch.float64:
        rounding = 100 * eps * max(largest, terms)
    return Judgement(error, eager_error, EAGER_FACTOR * eager_error + rounding)
