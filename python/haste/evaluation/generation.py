"""From a checkpoint to 8-bit pictures, each a function of its own number alone.

Picture i of a seed has its own random generator for its label, its starting noise and the noise of the SDE. So it is
the same picture in any batch size and in any number of pictures, up to the rounding of matrix products of other sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from haste.caching import TaylorSeer
from haste.errors import UserError
from haste.evaluation.images import to_uint8
from haste.models.sit import SiT
from haste.sampling import evaluations, initial_noise, sample
from haste.training.checkpoint import list_checkpoints, load_model
from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SamplingSettings:
    """How pictures are drawn. The names are those of SiT's and REPA's generate.py."""

    num_steps: int = 50
    """Steps from noise to picture."""
    mode: Literal["ode", "sde"] = "ode"
    """ode: the same noise gives the same picture, Euler steps. sde: fresh noise at every step, Euler-Maruyama."""
    heun: bool = False
    """Heun's second-order steps for the ODE: twice the work of Euler's, fewer steps needed."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_low: float = 0.0
    """Guide only from this time on, 0 being the picture ..."""
    guidance_high: float = 1.0
    """... up to this time, 1 being noise."""
    global_seed: int = 0
    """Same seed, same pictures, whatever the batch size."""
    labels: str = "random"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn, such as 3,1,4."""
    cache: Literal["none", "taylorseer"] = "none"
    """taylorseer: compute only one step in --interval and forecast the outputs of all modules at the others."""
    interval: int = 4
    """TaylorSeer: one full step every so many."""
    order: int = 4
    """TaylorSeer: order of the forecast; 0 repeats the last full step, published are up to 4."""
    ema: bool = True
    """Draw with the averaged weights; --no-ema draws with the trained ones."""

    @property
    def sampler(self) -> str:
        """The sampler's name in `haste.sampling`."""
        return "euler-maruyama" if self.mode == "sde" else "heun" if self.heun else "euler"

    def describe(self) -> str:
        """'50 Euler steps, guidance 1.5, TaylorSeer interval 4 order 4', for titles."""
        parts = [f"{self.num_steps} {self.sampler.title()} steps"]
        if self.cfg_scale > 1:
            parts.append(f"guidance {self.cfg_scale:g}")
        if self.cache == "taylorseer":
            parts.append(f"TaylorSeer interval {self.interval} order {self.order}")
        return ", ".join(parts)

    def sampling_fields(self) -> dict:
        """Exactly the settings that decide the pictures, with the same names and types in every subclass."""
        values = asdict(self)
        names = list(SamplingSettings.__dataclass_fields__)
        if self.cache == "none":
            names = [name for name in names if name not in ("interval", "order")]
        return {name: values[name] for name in names}

    def check(self) -> None:
        """UserError for settings that contradict each other; the sampler checks the values."""
        if self.heun and self.mode == "sde":
            raise UserError("--heun is a step of the ODE; it cannot be used with --mode sde")
        if self.cache == "none":
            for name in ("interval", "order"):
                if getattr(self, name) != SamplingSettings.__dataclass_fields__[name].default:
                    raise UserError(f"--{name} is {getattr(self, name)}, which nothing uses without --cache taylorseer")
        if self.global_seed < 0:
            raise UserError(f"--global-seed is {self.global_seed}; it must be at least 0")


@dataclass(frozen=True)
class Student:
    """A trained model with the settings of its run and the checkpoint file that it came from."""

    model: SiT
    config: TrainConfig
    checkpoint: Path

    @property
    def run(self) -> Path:
        """The run's folder: the one above checkpoints/, or the checkpoint's own."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder

    @property
    def step(self) -> int | None:
        """The training step, which is the file's name; None for a file that was renamed."""
        return int(self.checkpoint.stem) if self.checkpoint.stem.isdigit() else None

    @property
    def label(self) -> str:
        """'digits, step 2,000', for titles."""
        return f"{self.config.exp_name}, " + (self.checkpoint.stem if self.step is None else f"step {self.step:,}")


def load_student(path: Path, ema: bool = True) -> Student:
    """The student of a checkpoint file, or of the newest whole checkpoint of a run's folder.

    Raises UserError if there is none, or if the file does not hold one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(file: Path) -> Student:
        model, config = load_model(file, ema=ema)
        return Student(model.to(device), config, file)

    if not path.is_dir():
        return load(path)
    candidates = run_checkpoints(path)
    for candidate in reversed(candidates):
        try:
            return load(candidate)
        except UserError as error:
            logger.warning("%s; looking for an earlier one", error)
    raise UserError(f"none of the {len(candidates)} checkpoints in {path / 'checkpoints'} is whole")


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first; UserError if there are none."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run} holds no checkpoints; give a checkpoint file or the folder of a run of haste train")
    return checkpoints


def picture_generator(seed: int, index: int, purpose: Literal["label", "noise"]) -> torch.Generator:
    """The random generator that belongs to picture `index` of `seed` alone."""
    entropy = (seed, index, ("label", "noise").index(purpose))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def choose_labels(policy: str, seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """The labels (len(indices),) int64 of these pictures under a --labels policy. Raises UserError for a bad policy."""
    if policy == "random":
        draws = [torch.randint(num_classes, (), generator=picture_generator(seed, i, "label")) for i in indices]
        return np.array([int(draw) for draw in draws], dtype=np.int64)
    try:
        listed = np.arange(num_classes) if policy == "balanced" else np.array([int(x) for x in policy.split(",")])
    except ValueError:
        raise UserError(f"--labels is {policy!r}; it must be random, balanced, or classes such as 3,1,4") from None
    if listed.min() < 0 or listed.max() >= num_classes:
        raise UserError(f"--labels is {policy!r}; this model knows the classes 0 to {num_classes - 1}")
    return listed[np.asarray(indices) % len(listed)]


class Sampler:
    """Draws pictures of one student, batch by batch.

    Raises UserError for settings that contradict each other or do not fit the student.
    """

    def __init__(self, student: Student, settings: SamplingSettings) -> None:
        settings.check()
        model = student.model
        if model.in_channels not in (1, 3):
            raise UserError(f"the model draws {model.in_channels} channels; pictures have 1 or 3")
        if settings.cfg_scale > 1 and student.config.cfg_prob == 0:
            raise UserError(
                f"--cfg-scale is {settings.cfg_scale:g}; it must be 1 for a model trained with --cfg-prob 0"
            )
        self.student = student
        self.settings = settings
        self.cache = TaylorSeer(model, settings.interval, settings.order) if settings.cache == "taylorseer" else None

    @property
    def calls(self) -> tuple[int, int]:
        """Model evaluations of the last batch, and how many of them were full; the others were forecast."""
        if self.cache is not None:
            return self.cache.num_full + self.cache.num_skipped, self.cache.num_full
        count = len(evaluations(self.settings.sampler, self.settings.num_steps))
        return count, count

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """Run the model once on `count` pictures: a clock that starts now does not time what a first call sets up."""
        model = self.student.model
        like = next(model.parameters())
        x = like.new_zeros(count, model.in_channels, model.input_size, model.input_size)
        model(x, like.new_ones(count), torch.zeros(count, dtype=torch.int64, device=like.device))

    def draw(
        self, indices: Sequence[int], progress: Callable[[int, int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pictures with these numbers, (n, H, W, 3) uint8, and their labels (n,) int64, drawn as one batch.

        `progress` is called after every step with the steps done and their number.
        """
        settings, model = self.settings, self.student.model
        device = next(model.parameters()).device
        labels = choose_labels(settings.labels, settings.global_seed, indices, model.num_classes)
        generators = [picture_generator(settings.global_seed, index, "noise") for index in indices]
        shape = (len(indices), model.in_channels, model.input_size, model.input_size)
        images = sample(
            self.cache or model,
            initial_noise(shape, generators, dtype=model.dtype, device=device),
            torch.from_numpy(labels).to(device),
            num_steps=settings.num_steps,
            sampler=settings.sampler,
            path=self.student.config.path_type,
            cfg_scale=settings.cfg_scale,
            guidance_low=settings.guidance_low,
            guidance_high=settings.guidance_high,
            null_label=model.num_classes,
            generator=generators,
            progress=progress,
        )
        return to_uint8(images), labels
