"""From a checkpoint to 8-bit images.

Image i of a seed has its own random generator for its label, its initial noise and the noise of the SDE. So it does
not depend on the batch size or the number of images, except for the rounding of matrix products of other sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste.caching import CacheConfig, make_cache
from haste.caching.schedule import describe_steps
from haste.data.images import to_uint8
from haste.diffusion import NUM_TIMES
from haste.errors import UserError
from haste.generation.conditions import Texts, check_condition, open_conditions
from haste.generation.config import SamplingConfig, Settings
from haste.generation.loaded import LoadedCheckpoint, latent_format
from haste.models import SamplingCost
from haste.samplers import Guidance, PartCache, Solver, initial_noise, model_calls, time_grid, times_at
from haste.samplers.labels import POLICIES, image_generator
from haste.vae import VAE
from haste.validation import check_number

# Settings that decide the conditions of images, and whether the null one is needed.
CONDITION_SETTINGS = ("labels", "prompts", "text_encoder", "global_seed", "cfg_scale")

Progress = Callable[[int, int], None]
Observer = Callable[[int, Tensor], None]


class Start(NamedTuple):
    """The inputs of the sampler.

    noise: (n, C, S, S), or as the layout of the family has it. condition: (n, ...), what the model is given.
    generators: one per image, for SDE noise. labels: (n,) int64. captions: of a model of text.
    """

    noise: Tensor
    condition: Tensor
    generators: list[torch.Generator]
    labels: np.ndarray
    captions: Texts | None = None


def fit_to_family(settings: Settings, loaded: LoadedCheckpoint, fast: bool = False) -> Settings:
    """The settings as the model's family has them; those that `fast` chose, for a family whose blocks caches cannot
    take apart, of granularity output.

    Raises:
        UserError: labels of a model of text, or prompts of one of classes; a sampler of other models; settings for
            images made in parts, and the family makes them whole, or in another number of parts.
    """
    check_condition(settings, loaded)
    settings = _fit_sampler(settings, loaded)
    if settings.ema_decay == loaded.recorded.get("args", {}).get("ema_decay"):  # that of "ema", the default
        settings = replace(settings, ema_decay=None)
    _check_parts(settings, loaded)
    if loaded.layout.condition_shape is not None:
        settings = replace(settings, labels=POLICIES[0])  # which the settings of commands have in common
    if fast and loaded.family.cached(loaded.model) is None:
        settings = replace(settings, granularity="output")
    return settings.in_parts() if loaded.family.in_parts else settings


def _fit_sampler(settings: Settings, loaded: LoadedCheckpoint) -> Settings:
    title, channels = loaded.family.title, loaded.layout.input_shape[0]
    noise = loaded.family.prediction == "noise"
    modes, what = (("ddim", "ddpm"), "noise") if noise else (("ode", "sde"), "a velocity")
    settings = replace(settings, mode=settings.mode or modes[0])  # type: ignore[arg-type]
    if settings.mode not in modes:
        raise UserError(f"--mode must be {' or '.join(modes)} for this {title}, which predicts {what}, got "
                        f"{settings.mode}")  # fmt: skip
    if noise and settings.heun:
        raise UserError(f"--heun must be left out for this {title}, which predicts noise, got --heun")
    if not noise and settings.timestep_spacing is not None:
        raise UserError(f"--timestep-spacing must be left out for this {title}, which predicts a velocity, got "
                        f"{settings.timestep_spacing}")  # fmt: skip
    if noise:
        settings = replace(settings, timestep_spacing=settings.timestep_spacing or "linspace")
        _check_times(settings.num_steps, settings.timestep_spacing, title)
    if noise and settings.time_shift is not None:
        raise UserError(f"--time-shift must be left out for this {title}, which predicts noise, got "
                        f"{settings.time_shift:g}")  # fmt: skip
    if not noise:
        shift = loaded.config.time_shift if settings.time_shift is None else settings.time_shift
        check_number("time_shift", shift)
        settings = replace(settings, time_shift=shift)
    if settings.guided_channels is not None and not 1 <= settings.guided_channels <= channels:
        raise UserError(f"--guided-channels must be from 1 to {channels}, the channels of the model, got "
                        f"{settings.guided_channels}")  # fmt: skip
    _check_class_token(settings, loaded)
    return settings


def _check_class_token(settings: SamplingConfig, loaded: LoadedCheckpoint) -> None:
    """Raise UserError for guidance of a class token that the model lacks, or of some channels of its image."""
    title = loaded.family.title
    if settings.cls_cfg_scale is not None and not loaded.layout.class_token:
        raise UserError(f"--cls-cfg-scale must be left out for this {title}, which has no class token, got "
                        f"{settings.cls_cfg_scale:g}")  # fmt: skip
    if settings.guided_channels is not None and loaded.layout.class_token:
        raise UserError(f"--guided-channels must be left out for this {title}, whose image is guided whole, got "
                        f"{settings.guided_channels}; its class token has --cls-cfg-scale")  # fmt: skip


def _check_times(num_steps: int, spacing: str | None, title: str) -> None:
    """Raise UserError, naming the flags, for a number of steps that `spaced_times` refuses."""
    if num_steps > NUM_TIMES:
        raise UserError(f"--num-steps must be at most {NUM_TIMES}, the times of {title}, got {num_steps}")
    if spacing != "linspace" and NUM_TIMES % num_steps:
        raise UserError(f"--num-steps must divide {NUM_TIMES} with --timestep-spacing {spacing}, got {num_steps}; "
                        "linspace takes any number")  # fmt: skip


def _check_parts(settings: SamplingConfig, loaded: LoadedCheckpoint) -> None:
    parts, title = loaded.layout.parts, loaded.family.title
    for flag, given in (("cell-steps", settings.cell_steps or None), ("stagger", settings.stagger)):
        if given is not None and parts == 1:
            raise UserError(f"--{flag} must be left out for this {title}, which makes images in one part, got {given}")
    count = len(settings.cell_step_list)
    if count not in (0, parts):
        raise UserError(f"--cell-steps must have {parts} numbers, one for each part of an image, got {count}")


class Sampler:
    """Samples images of one model, batch by batch.

    Raises:
        UserError: settings contradict each other or do not fit the model.
    """

    def __init__(self, loaded: LoadedCheckpoint, settings: SamplingConfig) -> None:
        settings.check()
        settings = fit_to_family(settings, loaded)
        self.conditions = open_conditions(loaded, settings)
        self.loaded = loaded
        self.settings = settings
        self.latents = latent_format(loaded, settings.vae, settings.vae_stats)
        self.vae = None if self.latents is None else VAE(self.latents).to(self.device)
        self.cache = make_cache(loaded.model, settings)
        self._solver = self._new_solver([])

    @property
    def null(self) -> Tensor | None:
        """The condition of one image that stands for none."""
        return self.conditions.null

    @property
    def device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    @property
    def calls(self) -> tuple[int, int]:
        """Model calls (NFE) of the last batch, and how many of them were full, not forecast."""
        if self.cache is not None:
            report = self.cache.report
            return report.full_calls + report.forecast_calls, report.full_calls
        if self.loaded.family.in_parts:
            return self._solver.calls, self._solver.calls
        s = self.settings
        guidance = Guidance(s.cfg_scale, s.guidance_low, s.guidance_high, s.guidance_mode)
        count = len(model_calls(s.sampler, s.num_steps, guidance, *self._spacing))
        return count, count

    @property
    def _spacing(self) -> tuple[str, float, str]:
        """The arguments of `time_grid` besides sampler and steps."""
        return (
            self.settings.timestep_spacing or "linspace",
            self.settings.time_shift or 1.0,
            self.loaded.config.path_type,
        )

    @property
    def rows(self) -> int:
        """Rows per image: two with guidance (cond and uncond), also if these are separate batches."""
        return 2 if self.settings.cfg_scale > 1 else 1

    def with_full_steps(self, steps: Sequence[int]) -> Sampler:
        """A sampler of the same model whose full steps are exactly these."""
        settings = replace(
            self.settings,
            full_steps=describe_steps(steps),
            spacing="interval",
            order=min(self.settings.resolved_order, len(steps) - 1),
            interval=None,
            first_enhance=None,
            error_threshold=0.0,
        )
        return self.with_settings(settings)

    def with_settings(self, settings: SamplingConfig) -> Sampler:
        """A sampler of the same model and VAE with other settings."""
        settings.check()
        other = copy.copy(self)
        other.settings = fit_to_family(settings, self.loaded)
        if any(getattr(settings, name) != getattr(self.settings, name) for name in CONDITION_SETTINGS):
            other.conditions = open_conditions(self.loaded, other.settings)
        other.cache = make_cache(self.loaded.model, other.settings)
        other._solver = other._new_solver([])
        return other

    def speed_up(self, compile: bool, cuda_graphs: bool) -> None:
        """Compile the model with torch.compile, and replay its calls on a GPU as CUDA graphs.

        Raises:
            UserError: a compilation where images are made in parts; CUDA graphs without a cache of a model that makes
                them whole, or on no GPU.
        """
        if self.loaded.family.in_parts:
            if compile:
                title = self.loaded.family.title
                raise UserError(f"--compile must be left out for {title}, whose images are made in parts")
            if cuda_graphs:
                self.loaded.model.capture()
            return
        if compile and self.cache is not None:
            self.cache.compile()
        elif compile:
            for block in self.loaded.family.blocks(self.loaded.model):  # all share one compilation
                block.compile(fullgraph=True)
        if cuda_graphs:
            if self.cache is None:
                raise UserError("--cuda-graphs must come with a cache (--fast or --cache), got --cache none")
            self.cache.capture()

    def cost(self, count: int) -> SamplingCost | None:
        """What sampling `count` images at once takes; None if the family does not count it."""
        family, cache = self.loaded.family, self.cache if isinstance(self.cache, PartCache) else None
        return family.sampling_cost(self.loaded.model, self._new_solver([]), count, cache)

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """Run the model on `count` images, with a cache up to the first forecast step, and the VAE, before timing."""
        model = self.loaded.model
        if self.loaded.family.in_parts:
            self._warm_up_parts(count)
            return
        rows = count if self.settings.guidance_mode == "separate" else count * self.rows
        like = next(model.parameters())
        x = like.new_zeros(rows, *self.loaded.layout.noise_shape)
        y = self._blank(rows)
        if self.cache is None:
            model(x, torch.full((rows,), self.loaded.family.time(1.0), device=like.device), y)
        else:
            s, dtype = self.settings, torch.promote_types(like.dtype, torch.float32)
            times = time_grid(s.sampler, s.num_steps, *self._spacing)[:-1].tolist()
            self.cache.start(times)
            for time in times:
                self.cache(x, times_at(time, rows, dtype, like.device), y)
                if self.cache.report.forecast_calls:
                    break
        self._to_images(x.new_zeros(1, *self.loaded.layout.input_shape))

    def _warm_up_parts(self, count: int) -> None:
        """Two steps of every part: the first, which reads the part before, and a later one."""
        settings = replace(self.settings, num_steps=2, cell_steps="", stagger=None, **asdict(CacheConfig()))
        family, like = self.loaded.family, next(self.loaded.model.parameters())
        generators = [torch.Generator().manual_seed(0) for _ in range(count)]
        condition = self._blank(count)
        noise = like.new_zeros(count, *self.loaded.layout.noise_shape)
        solve = self.with_settings(settings)._new_solver(generators)
        self._to_images(family.sample(self.loaded.model, noise, condition, solve)[:1])

    def _blank(self, rows: int) -> Tensor:
        """A condition with which a model can be called."""
        shape = self.loaded.layout.condition_shape
        if shape is not None:
            return torch.zeros(rows, *shape, device=self.device)
        return self.loaded.family.condition(torch.zeros(rows, dtype=torch.int64, device=self.device))

    def sample(
        self, indices: Sequence[int], progress: Progress | None = None, observe: Observer | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the images with these numbers as one batch.

        Args:
            progress: called after each step with the number of steps done and in all.
            observe: called with each step's number and state, as in `haste.samplers.sample`.

        Returns:
            Images (n, H, W, 3) uint8 and labels (n,) int64, UNLABELLED of a model of text.
        """
        start = self.start_of(indices)
        images = self._to_images(self.run(start, progress, observe))
        if not images.isfinite().all():
            source = "the model" if self.latents is None else f"the VAE {self.latents.vae}"
            raise UserError(f"{source} returned NaN or infinity")
        return to_uint8(images, self.loaded.rounded), start.labels

    def sample_batches(
        self, count: int, batch_size: int, progress: Callable[[int], None] = lambda images: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the images below `count` in batches: (count, H, W, 3) uint8 and labels (count,) int64."""
        batches = []
        for start in range(0, count, batch_size):
            batches.append(self.sample(range(start, min(start + batch_size, count))))
            progress(len(batches[-1][1]))
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return images, labels

    def start_of(self, indices: Sequence[int]) -> Start:
        """The conditions, initial noise and generators of the images with these numbers."""
        conditions = self.conditions
        generators = [image_generator(self.settings.global_seed, index, "noise") for index in indices]
        shape = (len(indices), *self.loaded.layout.noise_shape)
        dtype = next(self.loaded.model.parameters()).dtype  # a family's module need not have one of its own
        noise = initial_noise(shape, generators, dtype=dtype, device=self.device)
        condition = conditions.of(indices).to(self.device)
        return Start(noise, condition, generators, conditions.labels(indices), conditions.captions(indices))

    def run(self, start: Start, progress: Progress | None = None, observe: Observer | None = None) -> Tensor:
        """Run the sampler without the VAE: (n, C, S, S), on the model's device."""
        family = self.loaded.family
        self._solver = self._new_solver(start.generators, progress, observe)
        model = self.cache or self.loaded.model
        return family.sample(model, start.noise, start.condition, self._solver)

    def _new_solver(
        self, generators: list[torch.Generator], progress: Progress | None = None, observe: Observer | None = None
    ) -> Solver:
        settings, layout = self.settings, self.loaded.layout
        image_alone = settings.cls_cfg_scale is not None  # is guided by cfg_scale; the class token has its own
        channels = prod(layout.input_shape) if image_alone else settings.guided_channels or self.loaded.guided_channels
        return Solver(
            num_steps=settings.num_steps,
            sampler=settings.sampler,
            path=self.loaded.config.path_type,
            cfg_scale=settings.cfg_scale,
            guidance_low=settings.guidance_low,
            guidance_high=settings.guidance_high,
            guidance=settings.guidance_mode,
            guided_channels=channels,
            others_scale=settings.cls_cfg_scale or 1.0,
            timestep_spacing=settings.timestep_spacing or "linspace",
            time_shift=settings.time_shift or 1.0,
            null=self.null,
            generator=generators,
            progress=progress,
            observe=observe,
            part_steps=settings.cell_step_list,
            stagger=settings.stagger,
        )

    def _to_images(self, x: Tensor) -> Tensor:
        """Decode model outputs to images (n, 1 or 3, H, W) in [-1, 1]."""
        return x if self.vae is None else self.vae.decode(x)
