"""A trained model with the settings of its run, loaded for sampling, and the format of its latents."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from haste.errors import UserError
from haste.models import Convention, Family, Layout, get_family
from haste.text import TextFormat
from haste.training.checkpoint import Checkpoint, list_checkpoints, loaded_model, read_checkpoint, sampling_config
from haste.training.config import TrainConfig
from haste.training.pipeline_folder import folder_of, weights_file
from haste.vae import PUBLISHED_VAES, LatentFormat
from haste.validation import check, shown
from haste.weights import BrokenCheckpoint

logger = logging.getLogger(__name__)

PUBLISHED = "ema"  # the VAE that generate.py of REPA, HASTE and SiT decodes with


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A trained model with the settings of its run.

    Attributes:
        model: in eval mode, without projectors; of `model_config`, see `haste.models.build_model`.
        config: the settings of the run that decide sampling.
        checkpoint: the file.
        recorded: its other content: `args`, all settings of the run; `z_dims`, the widths of the projectors;
            `convention`, "repa", "sit" or "dit"; in haste's own checkpoints `latents`, their format (None for pixels),
            and `class_names` by label, if the data has names; of runs on captions `text`, the format of their features,
            and `captions`, some of them.
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
    def num_classes(self) -> int:
        """The number of class labels. Raises UserError for a model that is not conditioned on classes."""
        count = self.layout.num_classes
        if count is None:
            raise UserError(f"--labels must be classes of the model, got {self.checkpoint}, which has none")
        return count

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes by label; empty if the checkpoint does not know them."""
        return self.recorded.get("class_names") or ()

    @property
    def text(self) -> TextFormat | None:
        """The format of the captions of training; None of a model of classes, and if the checkpoint does not know."""
        recorded = self.recorded.get("text")
        return None if recorded is None else TextFormat.from_dict(recorded, f"text of {self.checkpoint}")

    @property
    def captions(self) -> Sequence[str]:
        """Some captions of the data; empty if the checkpoint has none."""
        return self.recorded.get("captions") or ()

    @property
    def run(self) -> Path:
        """The run's folder: the parent of checkpoints/, a pipeline's folder, or the checkpoint's own folder."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder_of(self.checkpoint) or folder

    @property
    def step(self) -> int | None:
        """The training step, from the file's name; None for a renamed file."""
        return int(self.checkpoint.stem) if self.checkpoint.stem.isdecimal() else None

    @property
    def convention(self) -> Convention:
        """That of the checkpoint, which decides guided channels and rounding."""
        return self.recorded.get("convention", "repa")

    @property
    def guided_channels(self) -> int | None:
        """How many channels, from the first, the authors' sampler guides; None for all."""
        return self.family.foreign.guided_channels(self.convention, self.layout.input_shape[0])

    @property
    def rounded(self) -> bool:
        """Whether the authors' sampler rounds 8-bit images, as in SiT and DiT; REPA and HASTE truncate."""
        return self.convention in ("sit", "dit")

    @property
    def label(self) -> str:
        """'digits, step 2,000', for titles; at least the file's name."""
        where = self.checkpoint.stem if self.step is None else f"step {self.step:,}"
        return f"{self.config.exp_name}, {where}" if self.config.exp_name else where


def load_checkpoint(
    path: Path | str,
    ema: bool | float = True,
    *,
    device: torch.device | str | None = None,
    fused_attn: bool = True,
    assume: Mapping[str, Any] | None = None,
    convention: Convention | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint for sampling.

    Args:
        path: a checkpoint file of haste, HASTE, REPA, SiT or DiT, a run folder for its latest readable checkpoint, or
            the folder of a DiTPipeline of diffusers or of its transformer.
        ema: load the EMA weights; a number loads the average of this decay, of a run with several; False loads the
            trained weights.
        device: of the model; None for the GPU if there is one.
        fused_attn: False for unfused attention.
        assume: settings of the run, for a file without settings such as bare weights.
        convention: "repa" (also HASTE's), "sit" or "dit", for a file that does not tell which trainer wrote it.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    source: Path = check(path, Path, "path").expanduser()
    check(ema, bool | float, "ema")
    check(fused_attn, bool, "fused_attn")
    check(convention, Convention | None, "convention")
    device = _to_device(device)
    if not os.path.lexists(source):
        raise BrokenCheckpoint(f"--ckpt must be a checkpoint or the folder of a run, got {path}, which does not exist")
    files, of_run = _files_of(source) if source.is_dir() else ([source], False)
    for file in files:
        try:
            content = read_checkpoint(file, assume, convention)
            model, settings = loaded_model(content, ema, fused_attn).to(device), sampling_config(content, file)
            return LoadedCheckpoint(model, content["model_config"], settings, file, what_is_recorded(content))
        except BrokenCheckpoint as error:
            if not of_run:
                raise
            logger.warning("%s; trying the one before", error)
    raise UserError(f"all {len(files)} checkpoints in {source / 'checkpoints'} are damaged")


def _files_of(folder: Path) -> tuple[list[Path], bool]:
    """What a folder of --ckpt holds, in the order of trying, and whether it is a run's: checkpoints of a run, or the
    weights of a DiTPipeline."""
    weights = weights_file(folder, "--ckpt")
    return (run_checkpoints(folder, "--ckpt")[::-1], True) if weights is None else ([weights], False)


def _to_device(device: torch.device | str | None) -> torch.device:
    """The device of the argument `device`; None is the GPU, if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(
            f"device must be a torch.device, or the name of one such as cuda, got {shown(device)}"
        ) from None


def what_is_recorded(content: Checkpoint) -> dict[str, Any]:
    """`LoadedCheckpoint.recorded`, from the result of `read_checkpoint`."""
    last = re.compile(r"projectors\.\d+\.(4|projection_layer)\.weight")
    z_dims = [weight.shape[0] for name, weight in content["model"].items() if last.fullmatch(name) and weight.dim()]
    names = ("args", "convention", "latents", "class_names", "text", "captions")
    known: dict[str, Any] = {name: content[name] for name in names if name in content}
    return {"z_dims": z_dims, **known}


def run_checkpoints(run: Path, flag: str = "--run") -> list[Path]:
    """The checkpoints of a run folder, oldest first; UserError if there are none."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        wanted = f"{flag} must be the folder of a run of haste train"
        if list_checkpoints(run):  # checkpoints/ itself
            raise UserError(f"{wanted}, such as {run.absolute().parent}, got its folder {run}")
        raise UserError(f"{wanted}, got {run}, which holds no checkpoints")
    return checkpoints


# ---- between latents and images ----


def latent_format(
    loaded: LoadedCheckpoint, vae: str | None = None, vae_stats: str | None = None
) -> LatentFormat | None:
    """The format of a model's latents, decoded by --vae; None for a model of pixels. Raises UserError.

    A checkpoint of another trainer does not record the format: one or three channels are pixels, others latents of
    `vae`. Stable Diffusion's two VAEs have the same latents and differ in the decoder: without --vae, of the command or
    of the run, it is the published one. So a run of REPA's is decoded alike before and after haste resumes it.
    """
    channels, recorded = loaded.layout.input_shape[0], loaded.recorded.get("latents")
    if vae_stats is not None and ("latents" in loaded.recorded or vae is None):
        why = "without --vae" if vae is None else f"for {loaded.checkpoint}, which records those of training"
        raise UserError(f"--vae-stats must be left out {why}, got {vae_stats}")
    if recorded is not None:
        latents = LatentFormat.from_dict(recorded, f"latents of {loaded.checkpoint}")
        if vae is None and loaded.config.vae is None and latents.vae in PUBLISHED_VAES.values():
            vae = PUBLISHED
        other = latents if vae is None else LatentFormat.of(vae)
        if (other.channels, other.factor) != (latents.channels, latents.factor):
            raise UserError(
                f"--vae must have {latents.channels} channels and {latents.factor} pixels per latent, as "
                f"{latents.vae} of training, got {vae} with {other.channels} and {other.factor}"
            )
        return replace(latents, vae=other.vae)  # with the shift and scale of training
    if "latents" in loaded.recorded and vae is not None:
        raise UserError(f"--vae must be left out for a model of pixels, got {vae}")
    if "latents" in loaded.recorded or (vae is None and channels in (1, 3)):
        return None
    latents = LatentFormat.of(vae or PUBLISHED, vae_stats)
    if latents.channels != channels:
        raise UserError(
            f"--vae must have latents of {channels} channels, as the model, got {vae or PUBLISHED} with "
            f"{latents.channels}"
        )
    return latents
