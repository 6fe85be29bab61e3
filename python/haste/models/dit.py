"""DiT, the diffusion transformer (arXiv 2212.09748), by its own objective: it predicts DDPM's noise and a variance.

It is the transformer of `haste.models.sit`, with the same names of its parameters, twice the outputs, and other times:
the whole numbers 0 to 999, which are embedded as they are. Its noise, loss and times are in `haste.diffusion`, its
samplers in `haste.samplers`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haste import diffusion
from haste.models.dit_checkpoints import DiTCheckpoints
from haste.models.registry import register
from haste.models.sit import SiT
from haste.models.sit_family import PUBLISHED_ALIGNMENT, SIT_SIZES, SiTFamily
from haste.samplers import time_of


class DiT(SiT):
    """A diffusion transformer that predicts the noise of an image at time t, given its class, and between which bounds
    the variance of a step is.

    Args: those of `haste.models.SiT`.

    model(x, t, y) takes t (B,) of whole numbers from 0 to 999, and its prediction is (B, 2·C, S, S): the noise, then
    the variance, as `haste.diffusion` has them.
    """

    family = "dit"
    prediction = "noise"
    outputs = 2

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        _check_times(t)
        return super().conditioning(t, y)


def _check_times(t: Tensor) -> None:
    """Raise ValueError for times that are none of DiT's, such as SiT's, where that takes no waiting for a GPU."""
    if t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"t must be int64 or float32, got {str(t.dtype).removeprefix('torch.')}")
    if t.dtype == torch.bfloat16:
        raise ValueError("t must be int64 or float32, as bfloat16 has not all whole numbers up to "
                         f"{diffusion.NUM_TIMES - 1}, got bfloat16")  # fmt: skip
    if torch.compiler.is_compiling():
        return
    known = time_of(t)
    if known is None and t.device.type != "cpu":
        return
    values = t if known is None else torch.tensor(known)
    wrong = values[(values < 0) | (values >= diffusion.NUM_TIMES) | (values != values.floor())]
    if wrong.numel():
        raise ValueError(f"t must be whole numbers from 0 to {diffusion.NUM_TIMES - 1}, the times of DiT, got "
                         f"{wrong.flatten()[0].item():g}")  # fmt: skip


DIT_MODELS = {
    **{
        f"DiT-{size}/{patch}": {**shape, "patch_size": patch}
        for size, shape in SIT_SIZES.items()
        for patch in (2, 4, 8)
    },
    "DiT-Digits/2": SiTFamily.sizes["SiT-Digits/2"],
}
"""The published models, "DiT-S/2" to "DiT-XL/8", and one for the digits, by the arguments that make them."""


class DiTFamily(SiTFamily):
    """DiT, conditioned on a class."""

    name = "dit"
    title = "DiT"
    module = DiT
    with_class_token = None
    settings = {name: value for name, value in SiTFamily.settings.items() if name != "cls_coeff"}
    prediction = "noise"
    fixed = {"path_type": "linear", "weighting": "uniform", "time_shift": 1.0}  # its times are those of haste.diffusion
    published_alignment = {name.replace("SiT", "DiT"): value for name, value in PUBLISHED_ALIGNMENT.items()}
    sizes = DIT_MODELS
    foreign = DiTCheckpoints()

    # ---- a training step ----

    def sample_times(
        self,
        model: nn.Module,
        batch: int,
        weighting: str,
        path: str,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return diffusion.sample_times(batch, device=device, generator=generator)

    def time(self, share: float) -> float:
        return round(share * (diffusion.NUM_TIMES - 1))

    def interpolate(
        self, model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, path: str
    ) -> tuple[Tensor, diffusion.NoiseTarget]:
        return diffusion.add_noise(x, noise, t), diffusion.NoiseTarget(x, noise, t)

    def loss(self, predicted: Tensor, target: diffusion.NoiseTarget) -> Tensor:
        return diffusion.noise_loss(predicted, target)


register(DiTFamily())
