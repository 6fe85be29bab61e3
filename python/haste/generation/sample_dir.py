"""Samples in memory, and the folder of `haste sample`: numbered PNGs, and sample.json with their settings.

A folder holds the images of one command. Since an image depends only on its number, a killed command resumes with the
missing numbers, and a larger count adds to the existing images.

    <name>/000000.png ...   the images, in their own size
    <name>/sample.json      the settings, the seconds that sampling took, and measured full steps
    <name>/captions.json    of a model of text: {"captions": [one for each number]}, null where only features are known
    <name>.npz              arr_0 (N, H, W, 3) uint8 as for the ADM evaluator, and labels (N,) or captions (N,)
    <name>-grid.png         the first images, enlarged, with their labels or captions
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from haste.caching import check_memory
from haste.caching.schedule import describe_steps
from haste.data.images import image_path, read_image, write_image, write_npz
from haste.distributed import Processes, progress_bar
from haste.errors import UserError, require
from haste.generation.conditions import Texts
from haste.generation.config import SampleConfig, SamplingConfig
from haste.generation.loaded import LoadedCheckpoint, load_checkpoint
from haste.generation.pipeline import Sampler, fit_to_family
from haste.generation.prompts import join_prompts
from haste.io import read_json, remove_abandoned, write_json, writing
from haste.resumable import ResumableDir, differences
from haste.samplers.labels import NONE, UNLABELLED, number_labels
from haste.training.checkpoint import DIGEST, WRITTEN, as_before, checkpoint_identity
from haste.validation import build, check, check_number, shown

logger = logging.getLogger(__name__)

RECORD = "sample.json"
CAPTIONS = "captions.json"

THREADS = 8  # files that are read or written at a time
CHUNK = 256  # images in memory while the .npz is written
ALL_THERE = "the images are complete, and the same command tries again"
CALIBRATION_IMAGES = 8  # on which --error-threshold measures the full steps

# Arguments of `sample`, by the name of the setting that each of them is.
RENAMED = {
    "ckpt": "checkpoint", "num_fid_samples": "num_images", "per_proc_batch_size": "batch_size", "sample_dir": "folder",
}  # fmt: skip

# Of the grid: images up to SMALL pixels wide are shown MANY at a time, larger ones FEW, in their own size.
SMALL, MANY, FEW = 64, 100, 40


@dataclass
class Sampled:
    """How many images were sampled into a folder, the seconds it took, and the model calls per image (NFE)."""

    images: int = 0
    seconds: float = 0.0
    calls_per_image: int = 0
    full_per_image: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Record:
    """The content of a sample.json. full_steps: measured by --error-threshold."""

    settings: dict[str, Any]
    sampled: Sampled
    full_steps: list[int] | None = None


# Keys in the records of earlier versions.
OLD_NAMES = {
    "drawn": "sampled", "pictures": "images", "evaluations_per_picture": "calls_per_image",
    "evaluations_per_image": "calls_per_image", "full_per_picture": "full_per_image", "max_error": "error_threshold",
}  # fmt: skip


def read_record(folder: Path) -> Record:
    """Read a folder's sample.json. UserError if it is damaged."""
    path = folder / RECORD
    return _to_record(read_json(path, "the record of a sample folder"), path)


def read_captions(folder: Path) -> Texts | None:
    """The captions of a sample folder by the number of the image; None without any. UserError if they are damaged."""
    path, what = folder / CAPTIONS, "the captions of samples"
    if not os.path.lexists(path):
        return None
    return check(read_json(path, what, needs=["captions"])["captions"], list[str | None], f"captions of {path}")


def _to_record(content: Any, path: Path) -> Record:
    def renamed(value: Any) -> Any:
        return {OLD_NAMES.get(key, key): renamed(v) for key, v in value.items()} if isinstance(value, dict) else value

    return build(Record, renamed(content), str(path))


class SampleDir(ResumableDir):
    """A folder of samples with the same settings.

    Args:
        path: the folder. Nothing is written before the first image.
        settings: plain values that decide the images.
        before: the same settings in the form of earlier versions (`as_before`), so that their folders can be resumed.

    Attributes:
        sampled: what was sampled so far.
        full_steps: the full steps of all images of the folder, if --error-threshold measured them.
    """

    flag, content, record_name = "--sample-dir", "samples", RECORD

    def __init__(self, path: Path, settings: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
        self.before = before
        super().__init__(path, settings)

    def reopen(self) -> None:
        super().reopen()
        found = Record({}, Sampled()) if self.saved is None else _to_record(self.saved, self.record)
        self.sampled, self.full_steps = found.sampled, found.full_steps

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        shown = {DIGEST: "the checkpoint's content", WRITTEN: "the checkpoint's time"}
        found = _to_record(saved, self.record).settings
        own = self.before if self.before is not None and WRITTEN in found else self.settings
        return differences(*({shown.get(name, name): value for name, value in of.items()} for of in (found, own)))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder and remove unfinished files. UserError if another command holds it."""
        with super().hold():
            self.remove_leftovers()
            for path in (self.npz, self.grid):
                remove_abandoned(path, held=True)
            yield

    def missing(self, count: int) -> list[int]:
        """The numbers below `count` without an image."""
        return [index for index in range(count) if not image_path(self.path, index).is_file()]

    @property
    def held(self) -> int:
        """The number of images in the folder, which may be more than one command asks for."""
        return sum(1 for _ in self.path.glob("[0-9]*.png"))

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write images (n, H, W, 3) uint8 under these numbers. Any process may call it."""
        if not self.record.is_file():
            self._save()  # before the first image is in it
        paths = [image_path(self.path, index) for index in indices]
        with self.writing(), ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write_image, paths, images))

    def count(self, images: int, seconds: float, calls: int, full: int) -> None:
        """Add images, and the seconds and model calls that they took, to the record."""
        self.sampled = Sampled(self.sampled.images + images, self.sampled.seconds + seconds, calls, full)
        self._save()

    def read(self, count: int) -> Iterator[np.ndarray]:
        """Yield the first `count` images, (H, W, 3) uint8 each. Raises UserError if one cannot be read."""
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, count, CHUNK):
                numbers = range(start, min(start + CHUNK, count))
                try:
                    yield from pool.map(read_image, [image_path(self.path, number) for number in numbers])
                except UserError as error:
                    raise UserError(f"{error}; remove it and run the command again") from error

    def collect(self, labels: np.ndarray, captions: Texts | None = None) -> None:
        """Write the first images and their labels (N,), or their captions, to the .npz beside the folder; captions also
        into the folder. UserError if that fails."""
        if captions is not None and len(captions) > len(read_captions(self.path) or ()):
            with writing(str(self.path / CAPTIONS), ALL_THERE):
                write_json(self.path / CAPTIONS, {"captions": captions}, indent=1)
        with writing(str(self.npz), ALL_THERE):
            write_npz(self.npz, self.read(len(labels)), labels if captions is None else None, captions)

    @property
    def npz(self) -> Path:
        return self.path.with_name(self.path.name + ".npz")

    @property
    def grid(self) -> Path:
        return self.path.with_name(self.path.name + "-grid.png")

    def _save(self) -> None:
        full_steps = {} if self.full_steps is None else {"full_steps": self.full_steps}
        self.write_record({"settings": self.settings, "sampled": asdict(self.sampled), **full_steps})


@dataclass(frozen=True)
class Samples:
    """The images of a command with labels (N,), and captions of a model of text; `new` of them were sampled, the others
    were in the folder."""

    labels: np.ndarray
    folder: SampleDir
    new: int
    captions: Texts | None = None

    @cached_property
    def images(self) -> np.ndarray:
        """All of them in memory, (N, H, W, 3) uint8."""
        return np.stack(list(self.folder.read(len(self.labels))))

    @property
    def sampled(self) -> Sampled:
        return self.folder.sampled


def fill(sampler: Sampler, folder: SampleDir, count: int, batch_size: int, processes: Processes) -> int:
    """Sample the missing images below `count` under a progress bar, and return how many those were.

    The processes sample in rounds of one batch each, after which the first one updates the record. After a kill, all
    finished batches are in the folder, and counted up to the last round.
    """
    missing = processes.agree(lambda: folder.missing(count))
    batches = deal(missing, min(batch_size, math.ceil(count / processes.count)))
    if batches:
        largest = max(map(len, batches))
        loaded, guided = sampler.loaded, sampler.rows == 2
        check_memory(loaded.model, sampler.settings, largest, guided, input_shape=loaded.layout.noise_shape)
        sampler.warm_up(largest)
        if processes.rank < len(batches):  # which loads the text encoder, before the time is taken
            sampler.conditions.of(batches[processes.rank])
        if processes.first:
            log_cost(sampler, largest)
    with progress_bar(
        total=count, initial=count - len(missing), unit="image", desc="sample", disable=not processes.first
    ) as bar:
        for start in range(0, len(batches), processes.count):
            together = batches[start : start + processes.count]
            own = together[processes.rank] if processes.rank < len(together) else []
            before, size = bar.n, sum(map(len, together))

            def advance(step: int, steps: int, before=before, size=size) -> None:
                bar.update(before + size * step // steps - bar.n)

            seconds = 0.0
            if own:
                begin = perf_counter()
                images, _ = sampler.sample(own, advance)
                seconds = perf_counter() - begin
                folder.write(own, images)
            slowest = max(processes.gather(seconds))
            if processes.first:
                folder.count(size, slowest, *sampler.calls)
                bar.update(before + size - bar.n)
    return len(missing)


def log_cost(sampler: Sampler, count: int) -> None:
    """Say what a batch of images takes, of a family that counts it."""
    cost = sampler.cost(count)
    if cost is not None:
        logger.info("%.4g GFLOPs per image; keys and values of %d images take %.1f MiB", cost.flops / 1e9, count,
                    cost.kept_bytes / 2**20)  # fmt: skip


def deal(missing: list[int], size: int) -> list[list[int]]:
    """Split numbers into batches: each has the missing ones of k·size to (k + 1)·size − 1.

    So an image has the same others in its batch in any process and after resuming, and its matrix products are rounded
    alike.
    """
    return [list(batch) for _, batch in groupby(missing, key=lambda index: index // size)]


def open_sampler(loaded: LoadedCheckpoint, settings: SamplingConfig) -> Sampler:
    """A sampler whose full steps, with --error-threshold, are measured once and then the same for all images."""
    sampler = Sampler(loaded, settings)
    return sampler.with_full_steps(measure_full_steps(sampler)) if settings.error_threshold else sampler


def measure_full_steps(sampler: Sampler) -> list[int]:
    """The full steps of an adaptive schedule, on fixed images: a function of the weights, settings and seed."""
    cache = sampler.cache
    assert cache is not None
    sampler.sample(range(CALIBRATION_IMAGES))
    steps = cache.full_steps
    cache.release()
    return steps


def settle_full_steps(sampler: Sampler, folder: SampleDir, processes: Processes) -> Sampler:
    """As `open_sampler`, with full steps that the folder keeps: otherwise an image would depend on its batch."""
    if not sampler.settings.error_threshold:
        return sampler
    if folder.full_steps is None:
        folder.full_steps = processes.agree(lambda: measure_full_steps(sampler))
    steps = folder.full_steps
    error, total = sampler.settings.error_threshold, sampler.settings.num_steps
    logger.info("--error-threshold %g: %d of %d steps are full, %s", error, len(steps), total, describe_steps(steps))
    return sampler.with_full_steps(steps)


def sample(
    checkpoint: LoadedCheckpoint | Path | str,
    labels: int | str | Sequence[int] | np.ndarray | torch.Tensor | None = None,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    num_images: int | None = None,
    batch_size: int = 128,
    folder: Path | str | None = None,
    **settings: Any,
) -> np.ndarray:
    """Sample images.

    An image depends only on the checkpoint, the settings, `global_seed` and its number: the first ten of a hundred are
    the ten of another call, up to the rounding of matrix products of other sizes.

    Args:
        checkpoint: a checkpoint file of haste, HASTE, REPA, SiT or DiT, a run folder for its latest readable
            checkpoint, or the result of `load_checkpoint`.
        labels: classes to cycle through; or "random" (the default), "balanced", "none" for images of no class, or a
            text file with a class per line.
        prompts: of a model of text: texts to cycle through; or one text, a UTF-8 file with one per line, or a folder of
            captioned data. None: captions of the training data.
        num_images: None for one per label or prompt, or 16 without a list of them.
        batch_size: images at a time; affects speed and memory.
        folder: also write PNGs, an .npz and a grid into a subfolder, as `haste sample --sample-dir`; images that exist
            there are not sampled again.
        settings: fields of SamplingConfig, such as num_steps, mode, cfg_scale, global_seed, ema and vae, and of
            CacheConfig, such as cache and interval; fast=True for the recommended cache.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        UserError: settings or a checkpoint that cannot work, named by the flag; a folder of other images.
        TypeError: an unknown setting.
    """
    for name, argument in RENAMED.items():
        if name in settings:
            raise TypeError(f"settings must be fields of SamplingConfig, got {name}; pass it as {argument}")
    if not isinstance(checkpoint, (LoadedCheckpoint, str, os.PathLike)):
        raise UserError(f"checkpoint must be a path, or what load_checkpoint returns, got {shown(checkpoint)}")
    sample_dir: Path | None = check(folder, Path | None, "folder")
    loaded = checkpoint if isinstance(checkpoint, LoadedCheckpoint) else None
    listed = None if labels is None or isinstance(labels, str) else np.atleast_1d(np.asarray(labels)).tolist()
    if listed == []:
        raise UserError("labels must be one class or more, got []")
    policy = str(labels or "random") if listed is None else ",".join(map(str, listed))
    texts, given = _as_setting(prompts)
    listed = given if listed is None else listed
    count = num_images if num_images is not None else 16 if listed is None else len(listed)
    check_number("num_images", count, "num_images")
    check_number("per_proc_batch_size", batch_size, "batch_size")
    args = SampleConfig(
        ckpt=loaded.checkpoint if loaded is not None else Path(checkpoint).expanduser(),  # type: ignore[arg-type]
        labels=policy,
        prompts=texts,
        num_fid_samples=count,
        per_proc_batch_size=batch_size,
        sample_dir=sample_dir,
        **settings,
    )
    if folder is not None:
        return sample_to_folder(args, loaded).images
    args = args.resolved()
    args.check()
    loaded = loaded or _load(args, None)
    return open_sampler(loaded, fit_to_family(args, loaded, args.fast)).sample_batches(count, batch_size)[0]


def _as_setting(prompts: str | Path | Sequence[str] | None) -> tuple[str, Sequence[str] | None]:
    """The setting `prompts` for that argument of `sample`, and the texts of a list."""
    if prompts is None or isinstance(prompts, (str, os.PathLike)):
        return "" if prompts is None else os.fspath(prompts), None
    given = check(list(prompts) if isinstance(prompts, Sequence) else prompts, list[str], "prompts")
    if not given or not all(text.strip() for text in given):
        raise UserError("prompts must be one text or more, none of them empty, got " + shown(given))
    return join_prompts(given, "prompts"), given


def _load(args: SampleConfig, device: torch.device | None) -> LoadedCheckpoint:
    return load_checkpoint(
        args.ckpt,
        args.weights,
        device=device,
        fused_attn=args.fused_attn,
        assume=args.assumed(),
        convention=args.convention,
    )


def sample_to_folder(args: SampleConfig, loaded: LoadedCheckpoint | None = None) -> Samples:
    """Sample the missing images of a command and write .npz and grid, in every process. Raises UserError."""
    args = args.resolved()
    args.check()
    processes = Processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    loaded = loaded or _load(args, processes.device)
    args = fit_to_family(args, loaded, args.fast)
    args = replace(args, labels=number_labels(args.labels, loaded.class_names))
    sampler = Sampler(loaded, args)
    args.refuse_other(loaded, 1 if sampler.latents is None else sampler.latents.factor)
    count = args.num_fid_samples
    labels, captions = sampler.conditions.labels(range(count)), sampler.conditions.captions(range(count))
    with ExitStack() as stack:

        def open_folder() -> SampleDir:
            require("matplotlib")  # for the grid, before hours of sampling
            settings = settings_record(args, sampler)
            folder = SampleDir(folder_path(args, loaded), settings, as_before(settings, loaded.checkpoint))
            stack.enter_context(folder.hold())
            return folder

        folder = processes.agree(open_folder)
        sampler = settle_full_steps(sampler, folder, processes)
        sampler.speed_up(args.compile, args.cuda_graphs)
        new = fill(sampler, folder, count, args.per_proc_batch_size, processes)
        if sampler.conditions.truncated:
            logger.warning("%d of the prompts were truncated", sampler.conditions.truncated)

        def finish() -> None:
            folder.collect(labels, captions)
            with writing(str(folder.grid), ALL_THERE):
                write_grid(args, loaded, folder, labels, captions)

        processes.agree(finish)
    return Samples(labels, folder, new, captions)


def folder_path(args: SampleConfig, loaded: LoadedCheckpoint) -> Path:
    """<sample_dir>/<checkpoint>-<sampler>-<steps>...: the name has the settings that users vary most."""
    prefix = f"{args.prefix}-" if args.prefix else ""
    return (args.sample_dir or loaded.run / "samples") / f"{prefix}{loaded.checkpoint.stem}-{args.short_name()}"


def settings_record(args: SampleConfig, sampler: Sampler) -> dict:
    """All that decides the images, for sample.json."""
    path_type = sampler.loaded.config.path_type
    path = {} if path_type == "linear" else {"path_type": path_type}
    vae = {} if sampler.latents is None else {"vae": sampler.latents.vae}
    identity = checkpoint_identity(sampler.loaded.checkpoint)
    own = sampler.loaded.convention  # decides guided channels and rounding
    convention = {} if own == "repa" else {"convention": own}
    fields = args.sampling_fields()
    if sampler.loaded.layout.condition_shape is not None:
        del fields["labels"]
    return {**identity, **fields, **sampler.conditions.record(), **vae, **path, **convention}


def write_grid(
    args: SampleConfig, loaded: LoadedCheckpoint, folder: SampleDir, labels: np.ndarray, captions: Texts | None
) -> None:
    """Plot the first images: sorted by label, each under its own; or in order, each above its caption."""
    from haste.plotting import plot_grid

    (first,) = folder.read(1)
    many = captions is None and first.shape[1] <= SMALL
    shown = min(len(labels), MANY if many else FEW)
    images = np.stack(list(folder.read(shown)))
    title = f"{loaded.label}: {args.describe()}"
    if captions is not None:
        texts = [text or f"caption {number}" for number, text in enumerate(captions[:shown])]
        plot_grid(folder.grid, images, texts, title=title, below=True)
        return
    order = np.argsort(labels[:shown], kind="stable")
    names = {UNLABELLED: NONE, **dict(enumerate(loaded.class_names))}
    titles = [names.get(label, str(label)) for label in labels[order].tolist()]
    plot_grid(folder.grid, images[order], titles, title=title)
