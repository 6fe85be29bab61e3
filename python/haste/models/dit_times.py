"""DiT's embedding of times, computed with other frequencies.

DiT embeds t by cosines and sines of t·10000^(−i/128), diffusers' DiTTransformer2DModel by those of t·10000^(−i/127):
`downscale_freq_shift` is 1 there and no setting of the model. The published pipelines have DiT's weights as they are,
and so embed times that DiT was not trained on.

`fit_times` makes weights for the other frequencies. The first layer takes the features of one kind from those of the
other by least squares, which is exact for the slow ones alone: of the fast ones, neither spans the other. The second
layer is then fitted to the embedding itself. With 1,000 hidden units or more (DiT-L, XL) that can be equal at every
time; with fewer it can not, and the times of short runs come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from haste.diffusion import NUM_TIMES
from haste.errors import UserError
from haste.models.layers import TimestepEmbedder

Frequencies = Literal["dit", "diffusers"]

# The embedder's weights, as DiT names them.
NAMES = tuple(f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))

# Multiples of 10 are the leading times of runs of 10, 20, 25, 50 and 100 steps.
WEIGHT_OF_TENS = 1e4

# The smallest singular values, over the largest, that fits use. Of the first layer it bounds the coefficients, below 5,
# so that float32 and float16 still can compute with them; of the second it is what float64 resolves.
CUTOFF_FEATURES, CUTOFF_EMBEDDING = 1e-3, 1e-13


class FittedTimes(NamedTuple):
    """weights: by the names NAMES, typed as those that were fitted. error: the largest of |fitted − true| / |true| over
    the 1,000 times. error_of_tens: the same over the multiples of 10."""

    weights: dict[str, Tensor]
    error: float
    error_of_tens: float


def features(frequencies: Frequencies, count: int = 256) -> Tensor:
    """Cosines, then sines, of all 1,000 times, (1000, count), float64, rounded as both models compute them."""
    t = torch.arange(NUM_TIMES)
    if frequencies == "dit":
        return TimestepEmbedder(1, count).frequencies(t).double()
    half = count // 2
    angles = t[:, None].float() * torch.exp(-math.log(10000.0) * torch.arange(half).float() / (half - 1))
    return torch.cat([angles.cos(), angles.sin()], dim=1).double()


def fit_times(weights: Mapping[str, Tensor], source: Frequencies, target: Frequencies) -> FittedTimes:
    """Weights with which an embedder of the frequencies `target` embeds times as these do with those of `source`.

    Args:
        weights: NAMES among them.

    Raises:
        UserError: they are not finite.
    """
    broken = next((name for name in NAMES if not weights[name].isfinite().all()), None)
    if broken is not None:
        raise UserError(
            f"the embedder of times must be finite to be fitted to other frequencies, got NaN or infinity in {broken}"
        )
    count = weights[NAMES[0]].shape[1]
    given, wanted = features(source, count), features(target, count)
    first, first_bias, second, second_bias = (weights[name].double() for name in NAMES)
    embedding = _embed(given, first, first_bias, second, second_bias)

    by_wanted = torch.linalg.lstsq(_with_ones(wanted), given, rcond=CUTOFF_FEATURES, driver="gelsd").solution
    dtype = weights[NAMES[0]].dtype
    new_first = (first @ by_wanted[:-1].T).to(dtype)
    new_first_bias = (first_bias + first @ by_wanted[-1]).to(dtype)

    hidden = _with_ones(F.silu(wanted @ new_first.double().T + new_first_bias.double()))
    before = torch.cat([second.T, second_bias[None]])
    t = torch.arange(NUM_TIMES)
    weight = torch.ones(NUM_TIMES, dtype=torch.float64)
    weight[t % 10 == 0] = WEIGHT_OF_TENS
    missing = weight[:, None] * (embedding - hidden @ before)
    change = torch.linalg.lstsq(weight[:, None] * hidden, missing, rcond=CUTOFF_EMBEDDING, driver="gelsy").solution
    after = (before + change).to(dtype)

    fitted = dict(zip(NAMES, (new_first, new_first_bias, after[:-1].T.contiguous(), after[-1].clone()), strict=True))
    errors = (hidden @ after.double() - embedding).norm(dim=1) / embedding.norm(dim=1).clamp(min=1e-30)
    return FittedTimes(fitted, errors.max().item(), errors[t % 10 == 0].max().item())


def _embed(of_times: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
    return F.silu(of_times @ first.T + first_bias) @ second.T + second_bias


def _with_ones(columns: Tensor) -> Tensor:
    return torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
