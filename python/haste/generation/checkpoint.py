"""What lies between a student and images: nothing for pixels, or the decoder of a VAE.

The trained model behind a checkpoint, with the settings of its run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from haste.errors import UserError
from haste.models import Family, Layout, get_family
from haste.training.checkpoint import Checkpoint, list_checkpoints, loaded_model, read_student, sampling_config
from haste.training.config import TrainConfig
from haste.training.conventions import Convention, guided_channels
from haste.vae import PUBLISHED_VAES, LatentFormat
from haste.weights import BrokenCheckpoint

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = (1, 3)
PUBLISHED = "ema"  # what the generate.py of REPA, HASTE and SiT decode with


def latent_format(student: LoadedCheckpoint, vae: str | None = None) -> LatentFormat | None:
    """How a student's latents become images; None for one that draws pixels.

    vae: as --vae names it, in place of the one that the checkpoint names. Of a checkpoint that names none, as other
    trainers write them, one or three channels are pixels, and others the latents of this VAE.
    The two VAEs of Stable Diffusion make the same latents, so those do not tell by which they are decoded: it is the
    published one, unless the run was told another. So it is the same before and after a run of REPA's is gone on with.
    Raises UserError for a VAE that does not exist or does not fit.
    """
    channels = student.layout.input_shape[0]
    if "latents" not in student.recorded:
        if vae is None and channels in IMAGE_CHANNELS:
            return None
        latents = LatentFormat.of(vae or PUBLISHED)
        if latents.channels != channels:
            raise UserError(
                f"--vae is {vae or PUBLISHED}, whose latents have {latents.channels} channels; it must have the "
                f"{channels} that the model draws"
            )
        return latents
    saved = student.recorded["latents"]
    if saved is None:
        if vae is not None:
            raise UserError(f"--vae is {vae}, and the model draws pixels, which need none")
        return None
    latents = LatentFormat.from_dict(saved, f"latents of {student.checkpoint}")
    if vae is None and student.config.vae is None and latents.vae in PUBLISHED_VAES.values():
        vae = PUBLISHED
    return latents if vae is None else with_other_decoder(latents, vae)


def with_other_decoder(latents: LatentFormat, vae: str) -> LatentFormat:
    """The latents that a model was trained on, shift and scale included, decoded by another VAE."""
    other = LatentFormat.of(vae)
    if (other.channels, other.factor) != (latents.channels, latents.factor):
        raise UserError(
            f"--vae is {vae}, with {other.channels} channels and {other.factor} pixels per latent; it must have "
            f"{latents.channels} and {latents.factor}, as {latents.vae}, which the model was trained with"
        )
    return replace(latents, vae=other.vae)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A trained model with the settings of its run and the checkpoint file that it came from.

    recorded: what that file tells besides: `args`, the settings of its run; `z_dims`, the widths of its projectors;
    `convention`, whose it keeps; and, unless another trainer wrote it, `latents`, their format or None for pixels, and
    `class_names`, by label, where the data had names.
    """

    model: nn.Module
    model_config: Mapping[str, Any]
    config: TrainConfig
    checkpoint: Path
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return get_family(self.model_config)

    @property
    def layout(self) -> Layout:
        return self.family.layout(self.model_config)

    @property
    def run(self) -> Path:
        """The run's folder: the one above checkpoints/, or the checkpoint's own."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder

    @property
    def step(self) -> int | None:
        """The training step, which is the file's name; None for a file that was renamed."""
        return int(self.checkpoint.stem) if self.checkpoint.stem.isdecimal() else None

    @property
    def guided_channels(self) -> int | None:
        """How many channels, the first ones, its authors' sampler guides; None for all."""
        return guided_channels(self.recorded.get("convention", "repa"), self.layout.input_shape[0])

    @property
    def rounded(self) -> bool:
        """Whether its authors' sampler rounds 8-bit images, as SiT's does; REPA's and HASTE's truncate."""
        return self.recorded.get("convention") == "sit"

    @property
    def label(self) -> str:
        """'digits, step 2,000', for titles; the file's name where there is no more."""
        where = self.checkpoint.stem if self.step is None else f"step {self.step:,}"
        return f"{self.config.exp_name}, {where}" if self.config.exp_name else where


def load_checkpoint(
    path: Path | str,
    ema: bool = True,
    *,
    device: torch.device | None = None,
    fused_attn: bool = True,
    assume: Mapping[str, Any] | None = None,
    convention: Convention | None = None,
) -> LoadedCheckpoint:
    """Load the model of a checkpoint, in eval mode and without projectors, with all that its file tells.

    Args:
        path: a checkpoint file of haste, HASTE, REPA or SiT, or the folder of a run: then its newest whole checkpoint.
        ema: the averaged weights, which samples are made with, or the trained ones.
        device: where the model goes; None is the GPU if there is one.
        fused_attn: False computes attention step by step.
        assume: settings of the run for which the file has none, as a bare file of weights.
        convention: whose the file keeps, where it does not tell: "repa" (also HASTE's) or "sit".

    Raises:
        UserError: there is no checkpoint, or the file does not hold one.
    """
    path = Path(path).expanduser()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(file: Path) -> LoadedCheckpoint:
        content = read_student(file, assume, convention)
        model = loaded_model(content, ema, fused_attn).to(device)
        return LoadedCheckpoint(
            model, content["model_config"], sampling_config(content, file), file, what_is_recorded(content)
        )

    if not path.is_dir():
        return load(path)
    candidates = run_checkpoints(path)
    for candidate in reversed(candidates):
        try:
            return load(candidate)
        except BrokenCheckpoint as error:
            logger.warning("%s; looking for an earlier one", error)
    raise UserError(f"none of the {len(candidates)} checkpoints in {path / 'checkpoints'} is whole")


def what_is_recorded(content: Checkpoint) -> dict[str, Any]:
    """`Student.recorded` of what `read_student` returns."""
    last = re.compile(r"projectors\.\d+\.4\.weight")
    z_dims = [weight.shape[0] for name, weight in content["model"].items() if last.fullmatch(name) and weight.dim()]
    known = {name: content[name] for name in ("args", "convention", "latents", "class_names") if name in content}
    return {"z_dims": z_dims, **known}


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first; UserError if there are none."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        if list_checkpoints(run):  # the folder inside a run's, which its name invites one to give
            raise UserError(
                f"{run} is the folder of checkpoints inside a run's; give the run's own, {run.absolute().parent}, "
                "or one of the files"
            )
        raise UserError(f"{run} holds no checkpoints; give a checkpoint file or the folder of a run of haste train")
    return checkpoints
