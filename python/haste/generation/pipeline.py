"""From a loaded checkpoint to 8-bit images, each a function of its own number alone.

Image i of a seed has its own random generator for its label, its starting noise and the noise of the SDE. So it is
the same image in any batch size and in any number of images, up to the rounding of matrix products of other sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.caching import make_cache
from haste.caching.schedule import describe_steps
from haste.data.images import to_uint8
from haste.errors import UserError, shorten
from haste.generation.checkpoint import LoadedCheckpoint, latent_format
from haste.generation.config import SamplingConfig
from haste.samplers import Guidance, initial_noise, model_calls, solver, times_at
from haste.vae import VAE


def image_generator(seed: int, index: int, purpose: Literal["label", "noise"]) -> torch.Generator:
    """The random generator that belongs to image `index` of `seed` alone."""
    entropy = (seed, index, ("label", "noise").index(purpose))
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def choose_labels(policy: str, seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """The labels (len(indices),) int64 of these images under a --labels policy. Raises UserError for a bad policy."""
    if policy == "random":
        draws = [torch.randint(num_classes, (), generator=image_generator(seed, i, "label")) for i in indices]
        return np.array([int(draw) for draw in draws], dtype=np.int64)
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

    def __init__(self, student: LoadedCheckpoint, settings: SamplingConfig) -> None:
        settings.check()
        model = student.model
        self.null = student.family.null(model)
        if settings.cfg_scale > 1 and self.null is None:
            raise UserError(
                f"--cfg-scale is {settings.cfg_scale:g}; it must be 1 for a model trained with --cfg-prob 0"
            )
        self.student = student
        self.settings = settings
        self.latents = latent_format(student, settings.vae)
        self.vae = None if self.latents is None else VAE(self.latents).to(self.device)
        self.cache = make_cache(model, settings)

    @property
    def device(self) -> torch.device:
        return next(self.student.model.parameters()).device

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
        other.settings, other.cache = settings, make_cache(self.student.model, settings)
        return other

    def speed_up(self, compile: bool, cuda_graphs: bool) -> None:
        """Sample the same with less overhead: through torch.compile, or with a cache on a GPU through CUDA graphs."""
        if compile and self.cache is not None:
            self.cache.compile()
        elif compile:
            for block in self.student.family.blocks(self.student.model):  # all share one compilation
                block.compile(fullgraph=True)
        if cuda_graphs and self.cache is None:
            raise UserError("--cuda-graphs is given without a cache; it needs --fast or --cache")
        if cuda_graphs:
            self.cache.capture()

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """Run the model once on `count` images, with a cache until a step was forecast, and the VAE on one image: a
        clock that starts now does not time what a first call sets up."""
        model = self.student.model
        rows = count if self.settings.guidance_mode == "separate" else count * self.rows
        like = next(model.parameters())
        x = like.new_zeros(rows, *self.student.layout.input_shape)
        y = self.student.family.condition(torch.zeros(rows, dtype=torch.int64, device=like.device))
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

    def draw(
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
        return to_uint8(images, self.student.rounded), start.labels.cpu().numpy()

    def start_of(self, indices: Sequence[int]) -> Start:
        """Where the images with these numbers begin, as one batch."""
        settings, layout = self.settings, self.student.layout
        labels = choose_labels(settings.labels, settings.global_seed, indices, layout.num_classes)
        generators = [image_generator(settings.global_seed, index, "noise") for index in indices]
        shape = (len(indices), *layout.input_shape)
        noise = initial_noise(shape, generators, dtype=self.student.model.dtype, device=self.device)
        return Start(noise, torch.from_numpy(labels).to(self.device), generators)

    def run(self, start: Start, progress: Progress | None = None, observe: Observer | None = None) -> Tensor:
        """What the model and the sampler alone make of a start: (n, C, S, S), on the model's device."""
        settings, family = self.settings, self.student.family
        solve = solver(
            num_steps=settings.num_steps,
            sampler=settings.sampler,
            path=self.student.config.path_type,
            cfg_scale=settings.cfg_scale,
            guidance_low=settings.guidance_low,
            guidance_high=settings.guidance_high,
            guidance=settings.guidance_mode,
            guided_channels=self.student.guided_channels,
            null=self.null,
            generator=start.generators,
            progress=progress,
            observe=observe,
        )
        return family.sample(self.cache or self.student.model, start.noise, family.condition(start.labels), solve)

    def _to_images(self, x: Tensor) -> Tensor:
        """What the model samples, as images (n, 1 or 3, H, W) in [-1, 1]."""
        return x if self.vae is None else self.vae.decode(x)
