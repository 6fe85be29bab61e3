"""The sweep of a diffusers pipeline on disk: its images with a cache, beside those of its own uncached run."""

from __future__ import annotations

import gc
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from haste._compat import flop_counter
from haste.caching import cached
from haste.caching.config import CacheConfig
from haste.errors import UserError, in_one_line, require, shorten
from haste.evaluation.fidelity import compare_images
from haste.generation.config import SamplingConfig
from haste.generation.prompts import list_prompts, prompt_texts
from haste.io import LARGEST_JSON, parse_json, read_bytes
from haste.sweep.config import SweepConfig, long_name
from haste.sweep.records import Record, SweepDir
from haste.sweep.turns import Progress, Turns, stopwatch
from haste_ext.bench.measure import describe_machine, peak_extra_bytes

INDEX = "model_index.json"
LARGEST_CONFIG = 2**20  # bytes of a settings file that counts for the digest


# ---- the pipeline ----


@dataclass
class Pipeline:
    """A pipeline with what it is asked for.

    Args:
        pipe: of diffusers.
        folder: where it was loaded from.
        prompts: prompts, or of a pipeline for classes their numbers; images cycle through them.
        size: height and width, as far as they are given.
        seed: of the first image; the next has the next one.
    """

    pipe: Any
    folder: Path
    prompts: Sequence[str | int]
    size: dict[str, int]
    seed: int = 0

    @classmethod
    def load(cls, config: SweepConfig) -> Pipeline:
        """The pipeline of --pipeline, on the GPU in bfloat16 if there is one, else on the CPU in float32.

        Raises:
            UserError: a folder without a pipeline that has a transformer, or flags that it does not take.
        """
        assert config.pipeline is not None  # as SweepConfig has checked
        folder = config.pipeline.expanduser()
        check_index(folder)
        diffusers = require("diffusers")
        on_gpu = torch.cuda.is_available()
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(folder), torch_dtype=torch.bfloat16 if on_gpu else torch.float32, local_files_only=True
            )
        except Exception as error:  # whatever a broken file or a missing class makes of it
            raise UserError(f"--pipeline {folder} cannot be loaded: {in_one_line(error)}") from error
        pipe.set_progress_bar_config(disable=True)
        if on_gpu:
            pipe.to("cuda")
        size = {name: value for name in ("height", "width") if (value := getattr(config, name)) is not None}
        taken = inspect.signature(pipe.__call__).parameters
        for name in size:
            if name not in taken:
                raise UserError(f"--{name} must be left out with {type(pipe).__name__}, whose size is its own")
        return cls(pipe, folder, read_prompts(pipe, config.prompts), size, config.global_seed)

    @property
    def label(self) -> str:
        return f"{type(self.pipe).__name__} of {self.folder.resolve().name}"

    @property
    def transformers(self) -> dict[str, nn.Module]:
        """Its transformers by their names; Wan 2.2 has two."""
        components = self.pipe.components.items()
        return {name: part for name, part in components if "transformer" in name and isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.transformers.values())).parameters()).device

    @property
    def takes_classes(self) -> bool:
        return takes_classes(self.pipe)

    @torch.no_grad()
    def sample(self, indices: Sequence[int], num_steps: int) -> np.ndarray:
        """Images, or all frames of videos, (N, H, W, 3) uint8."""
        return np.concatenate([self._sample_one(index, num_steps) for index in indices])

    def _sample_one(self, index: int, num_steps: int) -> np.ndarray:
        prompt = self.prompts[index % len(self.prompts)]
        asked = {"class_labels": [prompt]} if self.takes_classes else {"prompt": prompt}
        generator = torch.Generator().manual_seed(self.seed + index)  # on the CPU: the same noise everywhere
        out = self.pipe(**asked, **self.size, num_inference_steps=num_steps, generator=generator, output_type="np")
        values = np.asarray(out[0], dtype=np.float32)
        values = values.reshape(-1, *values.shape[-3:])
        return np.rint(255 * values.clip(0, 1)).astype(np.uint8)

    @contextmanager
    def cached(self, settings: SamplingConfig) -> Iterator[Any]:
        """The handle of a cache, on for so long; None for uncached settings. Raises UserError if it cannot be."""
        if settings.cache == "none":
            yield None
            return
        chosen = {each.name: getattr(settings, each.name) for each in fields(CacheConfig)}
        resolved = {"interval": settings.resolved_interval, "first_enhance": settings.resolved_first_enhance}
        if settings.cache != "delta-dit":
            resolved["order"] = settings.resolved_order
        with cached(self.pipe, CacheConfig(**{**chosen, **resolved})) as handle:
            yield handle

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """A list that gets an entry for every call of a transformer."""
        calls: list[int] = []
        hooks = [model.register_forward_pre_hook(lambda *_: calls.append(1)) for model in self.transformers.values()]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


def check_index(folder: Path) -> None:
    """Raise UserError unless a folder holds a pipeline that has a transformer."""
    wanted = "--pipeline must be the folder of a diffusers pipeline"
    if not (folder / INDEX).is_file():
        why = f"which has no {INDEX}" if folder.is_dir() else "which is no folder"
        raise UserError(f"{wanted}, as save_pretrained writes it, got {folder}, {why}")
    index = parse_json(read_bytes(folder / INDEX, LARGEST_JSON), f"{folder / INDEX}", "the index of a pipeline")
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part != [None, None]}
    if not any("transformer" in name for name in parts):
        models = ", ".join(sorted(parts)) or "nothing"
        raise UserError(f"{wanted} that has a transformer, got {folder}, a {index.get('_class_name')} of {models}")


def takes_classes(pipe: Any) -> bool:
    """Whether a pipeline is called with classes in place of prompts."""
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def read_prompts(pipe: Any, given: str) -> list[str | int]:
    """The lines of --prompts, of a file or as they are; for classes their numbers, by default the first ten.

    Raises:
        UserError: no prompt, or a class that the pipeline does not have.
    """
    lines = prompt_texts(list_prompts(given))
    if not takes_classes(pipe):
        if not lines:
            raise UserError(f"--prompts must be a prompt, or a file with one on each line, got {shorten(given)!r}")
        return list(lines)
    classes = pipe.transformer.config.num_embeds_ada_norm
    names = [word.strip() for line in lines for word in ([line] if line in pipe.labels else line.split(","))]
    if not names:
        return list(range(min(classes, 10)))
    numbers: list[str | int] = []
    for name in names:
        number = int(name) if name.isascii() and name.isdecimal() else pipe.labels.get(name, -1)
        if not 0 <= number < classes:
            raise UserError(f"--prompts must be classes from 0 to {classes - 1}, or their names, got {shorten(name)}")
        numbers.append(number)
    return numbers


def digest(folder: Path) -> str:
    """12 hexadecimal digits that identify the files of a pipeline by their names and sizes, and its settings."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            if path.suffix == ".json" and path.stat().st_size < LARGEST_CONFIG:
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


# ---- the sweep ----


@dataclass
class PipelineSweep(Turns):
    """Measures points of one pipeline, an image at a time.

    Args:
        points: the first is the reference, the longest uncached run.
        images: of each point.
        repeats: how often each point is timed.
    """

    pipeline: Pipeline
    points: list[SamplingConfig]
    folder: SweepDir
    num_images: int
    repeats: int
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def shared(self) -> Record:  # type: ignore[override]
        pipeline, machine = self.pipeline, describe_machine(self.pipeline.device.type)
        used = pipeline.prompts[: self.num_images]
        return {
            "pipeline": {"name": pipeline.folder.resolve().name, "digest": digest(pipeline.folder)},
            "model": pipeline.label,
            "settings": {"global_seed": pipeline.seed},
            "prompts": list(used),
            "size": pipeline.size,
            "samples": self.num_images,
            "batch": 1,
            "evaluated_by": None,
            "machine": {name: machine[name] for name in ("device", "processor", "threads", "gpu", "torch")},
        }

    @property
    def images(self) -> int:
        """The number of images of `run`, if no point is skipped and none is known."""
        return len(self.points) * (self.num_images + self.repeats)

    @cached_property
    def _reference_images(self) -> np.ndarray:
        return self.pipeline.sample(range(self.num_images), self.points[0].num_steps)

    def _measure(self, settings: SamplingConfig, progress: Progress) -> bool:
        name = long_name(settings)
        if "psnr" in self._known(settings):
            progress(name, self.num_images)
            return True
        try:
            settings.check_run(settings.num_steps)
            with self.pipeline.cached(settings) as handle:
                cost = count_cost(self.pipeline, settings, handle)
                images = self.pipeline.sample(range(self.num_images), settings.num_steps)
        except UserError as error:
            if settings.cache == "none":
                raise
            self.skipped.append(f"{name}: {error}")
            progress(name, self.num_images + self.repeats)
            return False
        if settings is self.points[0]:
            self._reference_images = images
        same = np.array_equal(images, self._reference_images)
        fidelity = {"psnr": None, "ssim": None} if same else compare_images(images, self._reference_images).pooled()
        self._add(settings, **cost, fd=None, label_accuracy=None, **fidelity)
        progress(name, self.num_images)
        return True

    def _seconds(self, settings: SamplingConfig) -> float:
        pipeline = self.pipeline
        with pipeline.cached(settings):
            pipeline.sample([0], min(WARM_STEPS, settings.num_steps))
            gc.collect()
            with stopwatch(pipeline.device.type == "cuda") as elapsed:
                pipeline.sample([0], settings.num_steps)
                return elapsed()


WARM_STEPS = 8


def count_cost(pipeline: Pipeline, settings: SamplingConfig, handle: Any) -> dict[str, Any]:
    """The costs of an image that do not vary with the load of the machine; see `haste.sweep.measure.count_cost`."""

    def run() -> tuple[()]:
        pipeline.sample([0], settings.num_steps)
        return ()

    with pipeline.counting() as calls, flop_counter() as counter:
        run()
    peak = peak_extra_bytes(run, pipeline.device.type, calls=1)
    report = None if handle is None else handle.report
    return {
        "flops": counter.get_total_flops(),
        "peak_bytes": peak,
        "cache_bytes": 0 if report is None else round(report.mib * 2**20),
        "calls": len(calls) if report is None else report.full_calls + report.forecast_calls,
        "full_calls": len(calls) if report is None else report.full_calls,
        "full_steps": None if report is None else report.full_steps,
    }
