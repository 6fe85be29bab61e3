"""The path between data and noise, and what a model learns on it (SiT, arXiv 2401.08740; conventions of REPA).

Time runs from t = 0 (data x) to t = 1 (noise ε). On the way x_t = α(t)·x + σ(t)·ε, and its velocity
v = dx_t/dt = α'(t)·x + σ'(t)·ε is what the model predicts.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from haste.errors import UserError


class Coefficients(NamedTuple):
    """α, σ and their derivatives in t, each of t's shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Path(Protocol):
    """What the trainer and the samplers ask of a path."""

    def coefficients(self, t: Tensor) -> Coefficients: ...

    def time_of_noise_level(self, level: Tensor) -> Tensor:
        """The t at which σ(t)/α(t) is `level`."""
        ...


class LinearPath:
    """α = 1 − t, σ = t; so v = ε − x."""

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def time_of_noise_level(self, level: Tensor) -> Tensor:
        return level / (1 + level)


class CosinePath:
    """α = cos(πt/2), σ = sin(πt/2)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        half_pi = math.pi / 2
        cos, sin = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return Coefficients(cos, sin, -half_pi * sin, half_pi * cos)

    def time_of_noise_level(self, level: Tensor) -> Tensor:
        return torch.atan(level) * (2 / math.pi)


PATHS: dict[str, Path] = {"linear": LinearPath(), "cosine": CosinePath()}
WEIGHTINGS = ("uniform", "lognormal")


def get_path(name: str) -> Path:
    """The path of that name.

    Raises:
        UserError: a name that is not in PATHS.
    """
    if name not in PATHS:
        raise UserError(f"path is {name!r}; it must be one of {', '.join(PATHS)}")
    return PATHS[name]


def _broadcast(t: Tensor, images: Tensor) -> Tensor:
    """t (B,) beside images (B, ...), in the images' type; a scalar t is left as it is."""
    return t.to(images.dtype).view(-1, *[1] * (images.dim() - 1)) if t.dim() else t.to(images.dtype)


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
    raise UserError(f"weighting is {weighting!r}; it must be one of {', '.join(WEIGHTINGS)}")


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """x_t = α·x + σ·ε  and  v = α'·x + σ'·ε.

    Args:
        x, noise: (B, ...), one type.
        t: (B,).

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
        raise ValueError(f"predicted has shape {tuple(predicted.shape)}; it must be {tuple(target.shape)}, as target")
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
