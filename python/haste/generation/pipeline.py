"""From a checkpoint to 8-bit images, each a function of its own number alone.

Image i of a seed has its own random generator for its label, its starting noise and the noise of the SDE. So it is
the same image in any batch size and in any number of images, up to the rounding of matrix products of other sizes.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from haste.caching import make_cache
from haste.caching.schedule import describe_steps
from haste.data.images import to_uint8
from haste.errors import UserError, shorten
from haste.generation.config import SamplingConfig
from haste.models import Convention, Family, Layout, get_family
from haste.samplers import Guidance, initial_noise, model_calls, solver, times_at
from haste.training.checkpoint import Checkpoint, list_checkpoints, loaded_model, read_checkpoint, sampling_config
from haste.training.config import TrainConfig
from haste.vae import PUBLISHED_VAES, VAE, LatentFormat
from haste.weights import BrokenCheckpoint

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = (1, 3)
PUBLISHED = "ema"  # what the generate.py of REPA, HASTE and SiT decode with


# ---- the checkpoint ----


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
        return self.family.foreign.guided_channels(self.recorded.get("convention", "repa"), self.layout.input_shape[0])

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
        content = read_checkpoint(file, assume, convention)
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
    """`LoadedCheckpoint.recorded` of what `read_checkpoint` returns."""
    last = re.compile(r"projectors\.\d+\.4\.weight")
    z_dims = [weight.shape[0] for name, weight in content["model"].items() if last.fullmatch(name) and weight.dim()]
    names = ("args", "convention", "latents", "class_names")
    known: dict[str, Any] = {name: content[name] for name in names if name in content}
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


# ---- between latents and images ----


def latent_format(loaded: LoadedCheckpoint, vae: str | None = None) -> LatentFormat | None:
    """How what a model samples becomes images; None for pixels.

    vae: as --vae names it, in place of the one that the checkpoint names. Of a checkpoint that names none, as other
    trainers write them, one or three channels are pixels, and others the latents of this VAE.
    The two VAEs of Stable Diffusion make the same latents, so those do not tell by which they are decoded: it is the
    published one, unless the run was given another. So it is the same before and after a run of REPA's is resumed.
    Raises UserError for a VAE that does not exist or does not fit.
    """
    channels = loaded.layout.input_shape[0]
    if "latents" not in loaded.recorded:
        if vae is None and channels in IMAGE_CHANNELS:
            return None
        latents = LatentFormat.of(vae or PUBLISHED)
        if latents.channels != channels:
            raise UserError(
                f"--vae is {vae or PUBLISHED}, whose latents have {latents.channels} channels; it must have the "
                f"{channels} that the model samples"
            )
        return latents
    saved = loaded.recorded["latents"]
    if saved is None:
        if vae is not None:
            raise UserError(f"--vae is {vae}, and the model samples pixels, which need none")
        return None
    latents = LatentFormat.from_dict(saved, f"latents of {loaded.checkpoint}")
    if vae is None and loaded.config.vae is None and latents.vae in PUBLISHED_VAES.values():
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


# ---- images ----


def image_generator(seed: int, index: int, purpose: Literal["label", "noise"]) -> torch.Generator:
    """The random generator that belongs to image `index` of `seed` alone."""
    entropy = (seed, index, ("label", "noise").index(purpose))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def choose_labels(policy: str, seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """The labels (len(indices),) int64 of these images under a --labels policy. Raises UserError for a bad policy."""
    if policy == "random":
        chosen = [torch.randint(num_classes, (), generator=image_generator(seed, i, "label")) for i in indices]
        return np.array([int(label) for label in chosen], dtype=np.int64)
    listed = list(range(num_classes)) if policy == "balanced" else _listed_classes(policy)
    unknown = [label for label in listed if not 0 <= label < num_classes]
    if unknown:
        known = f"this model knows the classes 0 to {num_classes - 1}"
        raise UserError(f"--labels is {shorten(policy)} and has {shorten(unknown[0])}; {known}")
    return np.array(listed, dtype=np.int64)[np.asarray(indices) % len(listed)]


def _listed_classes(policy: str) -> list[int]:
    try:
        if not policy.isascii():  # int() reads the digits of other scripts
            raise ValueError
        return [int(word) for word in policy.split(",")]
    except ValueError:
        raise UserError(
            f"--labels must be random, balanced, classes such as 3,1,4, or a file of them, got {shorten(policy)}"
        ) from None


Progress = Callable[[int, int], None]
Observer = Callable[[int, Tensor], None]


class Start(NamedTuple):
    """noise: (n, C, S, S). labels: (n,) int64. generators: one per image, for the noise of the SDE."""

    noise: Tensor
    labels: Tensor
    generators: list[torch.Generator]


class Sampler:
    """Samples images of one model, batch by batch.

    Raises UserError for settings that contradict each other or do not fit the model.
    """

    def __init__(self, loaded: LoadedCheckpoint, settings: SamplingConfig) -> None:
        settings.check()
        model = loaded.model
        self.null = loaded.family.null(model)
        if settings.cfg_scale > 1 and self.null is None:
            raise UserError(
                f"--cfg-scale is {settings.cfg_scale:g}; it must be 1 for a model trained with --cfg-prob 0"
            )
        self.loaded = loaded
        self.settings = settings
        self.latents = latent_format(loaded, settings.vae)
        self.vae = None if self.latents is None else VAE(self.latents).to(self.device)
        self.cache = make_cache(model, settings)

    @property
    def device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    @property
    def calls(self) -> tuple[int, int]:
        """Model calls of the last batch, and how many of them were full; the others were forecast."""
        if self.cache is not None:
            return self.cache.num_full + self.cache.num_forecast, self.cache.num_full
        s = self.settings
        guidance = Guidance(s.cfg_scale, s.guidance_low, s.guidance_high, s.guidance_mode)
        count = len(model_calls(s.sampler, s.num_steps, guidance))
        return count, count

    @property
    def rows(self) -> int:
        """Rows that the cache keeps for one image, and the model sees at once but for separate guidance: two under
        guidance."""
        return 2 if self.settings.cfg_scale > 1 else 1

    def with_full_steps(self, steps: Sequence[int]) -> Sampler:
        """The same, with exactly these steps in full."""
        settings = replace(
            self.settings,
            full_steps=describe_steps(steps),
            order=min(self.settings.resolved_order, len(steps) - 1),  # there is never more to forecast from
            **dict.fromkeys(("interval", "first_enhance")),
            error_threshold=0.0,
        )
        return self.with_settings(settings)

    def with_settings(self, settings: SamplingConfig) -> Sampler:
        """The same model and the same VAE, sampled otherwise."""
        settings.check()
        other = copy.copy(self)
        other.settings, other.cache = settings, make_cache(self.loaded.model, settings)
        return other

    def speed_up(self, compile: bool, cuda_graphs: bool) -> None:
        """Sample the same with less overhead: through torch.compile, or with a cache on a GPU through CUDA graphs."""
        if compile and self.cache is not None:
            self.cache.compile()
        elif compile:
            for block in self.loaded.family.blocks(self.loaded.model):  # all share one compilation
                block.compile(fullgraph=True)
        if cuda_graphs and self.cache is None:
            raise UserError("--cuda-graphs is given without a cache; it needs --fast or --cache")
        if cuda_graphs:
            self.cache.capture()

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """Run the model once on `count` images, with a cache until a step was forecast, and the VAE on one image: a
        clock that starts now does not time what a first call sets up."""
        model = self.loaded.model
        rows = count if self.settings.guidance_mode == "separate" else count * self.rows
        like = next(model.parameters())
        x = like.new_zeros(rows, *self.loaded.layout.input_shape)
        y = self.loaded.family.condition(torch.zeros(rows, dtype=torch.int64, device=like.device))
        if self.cache is None:
            model(x, like.new_ones(rows), y)
        else:
            steps = self.settings.num_steps
            times = [1 - step / steps for step in range(steps)]
            self.cache.start(times)
            for time in times:
                self.cache(x, times_at(time, rows, like.dtype, like.device), y)
                if self.cache.num_forecast:
                    break
        self._to_images(x[:1])

    def sample(
        self, indices: Sequence[int], progress: Progress | None = None, observe: Observer | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images with these numbers, (n, H, W, 3) uint8, and their labels (n,) int64, sampled as one batch.

        `progress` is called after every step with the steps done and their number, `observe` with the step's number
        and the state, as in `haste.samplers.sample`.
        """
        start = self.start_of(indices)
        images = self._to_images(self.run(start, progress, observe))
        if not images.isfinite().all():
            source = "the model" if self.vae is None else f"the VAE {self.latents.vae}"
            raise UserError(f"{source} gave NaN or infinity in place of images")
        return to_uint8(images, self.loaded.rounded), start.labels.cpu().numpy()

    def start_of(self, indices: Sequence[int]) -> Start:
        """Where the images with these numbers begin, as one batch."""
        settings, layout = self.settings, self.loaded.layout
        labels = choose_labels(settings.labels, settings.global_seed, indices, layout.num_classes)
        generators = [image_generator(settings.global_seed, index, "noise") for index in indices]
        shape = (len(indices), *layout.input_shape)
        noise = initial_noise(shape, generators, dtype=self.loaded.model.dtype, device=self.device)
        return Start(noise, torch.from_numpy(labels).to(self.device), generators)

    def run(self, start: Start, progress: Progress | None = None, observe: Observer | None = None) -> Tensor:
        """What the model and the sampler alone make of a start: (n, C, S, S), on the model's device."""
        settings, family = self.settings, self.loaded.family
        solve = solver(
            num_steps=settings.num_steps,
            sampler=settings.sampler,
            path=self.loaded.config.path_type,
            cfg_scale=settings.cfg_scale,
            guidance_low=settings.guidance_low,
            guidance_high=settings.guidance_high,
            guidance=settings.guidance_mode,
            guided_channels=self.loaded.guided_channels,
            null=self.null,
            generator=start.generators,
            progress=progress,
            observe=observe,
        )
        return family.sample(self.cache or self.loaded.model, start.noise, family.condition(start.labels), solve)

    def _to_images(self, x: Tensor) -> Tensor:
        """What the model samples, as images (n, 1 or 3, H, W) in [-1, 1]."""
        return x if self.vae is None else self.vae.decode(x)
