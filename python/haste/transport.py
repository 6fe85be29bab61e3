"""The path between data and noise, and the velocity that a model learns (SiT, arXiv 2401.08740; conventions of REPA).

Time runs from t = 0 (data x) to t = 1 (noise ε). On the way x_t = α(t)·x + σ(t)·ε, and its velocity
v = dx_t/dt = α'(t)·x + σ'(t)·ε is what the model predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from haste.errors import UserError


class Coefficients(NamedTuple):
    """α, σ and their derivatives in t, each of t's shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Path(NamedTuple):
    """coefficients: α(t), σ(t), their derivatives. time_of_noise_level: the t at which σ(t)/α(t) is a given level.
    shifted: of t and s, the time at which that level is s times that of t."""

    coefficients: Callable[[Tensor], Coefficients]
    time_of_noise_level: Callable[[Tensor], Tensor]
    shifted: Callable[[Tensor, float], Tensor]


def _linear(t: Tensor) -> Coefficients:
    """α = 1 − t, σ = t; so v = ε − x."""
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def _cosine(t: Tensor) -> Coefficients:
    """α = cos(πt/2), σ = sin(πt/2)."""
    half_pi = math.pi / 2
    cos, sin = torch.cos(half_pi * t), torch.sin(half_pi * t)
    return Coefficients(cos, sin, -half_pi * sin, half_pi * cos)


def _shifted_linear(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _shifted_cosine(t: Tensor, shift: float) -> Tensor:
    alpha, sigma, _, _ = _cosine(t)
    return torch.atan2(shift * sigma, alpha.clamp(min=0)) * (2 / math.pi)  # cos(π/2) may be below 0 by rounding


PATHS = {
    "linear": Path(_linear, lambda level: level / (1 + level), _shifted_linear),
    "cosine": Path(_cosine, lambda level: torch.atan(level) * (2 / math.pi), _shifted_cosine),
}
WEIGHTINGS = ("uniform", "lognormal")


def get_path(name: str) -> Path:
    """The path of that name.

    Raises:
        UserError: a name that is not in PATHS.
    """
    if name not in PATHS:
        raise UserError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    return PATHS[name]


def _broadcast(t: Tensor, images: Tensor) -> Tensor:
    """t beside images (B, ...), in their type; a scalar, or a t of as many dimensions, is left as it is."""
    t = t.to(images.dtype)
    return t.view(-1, *[1] * (images.dim() - 1)) if t.dim() == 1 else t


def sample_time(
    batch: int,
    weighting: str = "uniform",
    path: str = "linear",
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Times to train at, (batch,), float32, in [0, 1].

    uniform: t ~ U(0, 1).
    lognormal: ln(σ(t)/α(t)) ~ N(0, 1), the noise levels of EDM (arXiv 2206.00364).

    Raises:
        UserError: an unknown weighting or path.
    """
    chosen = get_path(path)
    if weighting == "uniform":
        return torch.rand(batch, device=device, generator=generator)
    if weighting == "lognormal":
        return chosen.time_of_noise_level(torch.randn(batch, device=device, generator=generator).exp())
    raise UserError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")


def shift_time(t: Tensor, shift: float = 1.0, path: str = "linear") -> Tensor:
    """The times t', of t's shape, whose noise level σ(t')/α(t') is `shift` times that of t: above 1 nearer to noise.

    On the linear path t' = s·t / (1 + (s − 1)·t) (SD3, arXiv 2403.03206, eq. 23; RAE, arXiv 2510.11690, has
    s = √(dimension of a latent / 4096)). Code whose t = 1 is data, such as LightningDiT's, applies the same formula to
    1 − t: its shift is 1/s.

    Raises:
        UserError: an unknown path.
    """
    shifted = get_path(path).shifted
    return t if shift == 1 else shifted(t, shift)


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """x_t = α·x + σ·ε  and  v = α'·x + σ'·ε.

    Args:
        x, noise: (B, ...), one type.
        t: (B,), or with as many dimensions as x, such as one time for each pixel (B, 1, H, W).

    Returns:
        x_t and v, shaped and typed as x.
    """
    alpha, sigma, d_alpha, d_sigma = get_path(path).coefficients(_broadcast(t, x))
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def velocity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """L_v = mean over the batch of the mean of (v̂ − v)² over everything else; a float32 scalar (float64 for float64).

    Raises:
        ValueError: the two differ in shape (broadcasting would hide a mistake).
    """
    if predicted.shape != target.shape:
        shapes = f"{tuple(target.shape)}, got {tuple(predicted.shape)}"
        raise ValueError(f"predicted must have the shape of target, {shapes}")
    at_least_float = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(at_least_float) - target).square().flatten(1).mean(dim=1).mean()


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """∇ log p_t(x) = (r·v − x) / (σ² − r·σ'·σ), with r = α/α'.

    Args:
        velocity, x: (B, ...).
        t: (B,) or a scalar tensor, in (0, 1]. At t = 0 the score is not defined, and the result is not finite.
    """
    alpha, sigma, d_alpha, d_sigma = get_path(path).coefficients(_broadcast(t, x))
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)
