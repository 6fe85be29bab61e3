"""Images in memory, and the folder that `haste sample` fills: numbered PNGs, and sample.json with their settings.

A folder takes images of one command only. Since an image depends on its number alone, a command that was killed
resumes with the numbers that are missing, and a larger count adds to what is there.

    <name>/000000.png ...   the images, in their own size
    <name>/sample.json      settings, the seconds that sampling took, and full steps that were measured
    <name>.npz              arr_0 (N, H, W, 3) uint8 as the ADM evaluator reads it, and labels (N,)
    <name>-grid.png         some of them, enlarged, with their labels
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
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
from haste.generation.config import SampleConfig
from haste.generation.pipeline import LoadedCheckpoint, Sampler, choose_labels, load_checkpoint
from haste.io import read_json, remove_abandoned, writing
from haste.resumable import ResumableDir, differences
from haste.training.checkpoint import DIGEST, WRITTEN, as_before, checkpoint_identity
from haste.validation import build

logger = logging.getLogger(__name__)

RECORD = "sample.json"

THREADS = 8  # files that are read or written at a time
ALL_THERE = "the images are all there, and the same command tries again"

CHUNK = 256  # images in memory while the .npz is written


@dataclass
class Sampled:
    """What was sampled into a folder so far, the seconds it took, and the model calls of an image (NFE)."""

    images: int = 0
    seconds: float = 0.0
    calls_per_image: int = 0
    full_per_image: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Record:
    """The content of a sample.json. full_steps: those that --error-threshold has found."""

    settings: dict[str, Any]
    sampled: Sampled
    full_steps: list[int] | None = None


# Of records that earlier versions wrote.
OLD_NAMES = {
    "drawn": "sampled", "pictures": "images", "evaluations_per_picture": "calls_per_image",
    "evaluations_per_image": "calls_per_image", "full_per_picture": "full_per_image", "max_error": "error_threshold",
}  # fmt: skip


def read_record(folder: Path) -> Record:
    """The content of a folder's sample.json. UserError if it is not one."""
    path = folder / RECORD
    return _to_record(read_json(path, "the record of a sample folder"), path)


def _to_record(content: Any, path: Path) -> Record:
    def renamed(value: Any) -> Any:
        return {OLD_NAMES.get(key, key): renamed(v) for key, v in value.items()} if isinstance(value, dict) else value

    return build(Record, renamed(content), str(path))


class SampleDir(ResumableDir):
    """A folder of samples that all have the same settings.

    Args:
        path: the folder. Nothing is written before the first image.
        settings: plain values, which decide the images.
        before: the same as earlier versions recorded them (`as_before`), so that their folders are resumed.

    Attributes:
        sampled: what is there.
        full_steps: those that --error-threshold has found, which hold for all images of the folder.
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
        """Keep other commands out; what a kill has left of a write is gone. UserError if another command is in it."""
        with super().hold():
            self.remove_leftovers()
            for path in (self.npz, self.grid):
                remove_abandoned(path, held=True)
            yield

    def missing(self, count: int) -> list[int]:
        """The numbers below `count` whose image is not there yet."""
        return [index for index in range(count) if not image_path(self.path, index).is_file()]

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write images (n, H, W, 3) uint8 under these numbers; any process may."""
        if not self.record.is_file():
            self._save()  # before the first image is in it
        paths = [image_path(self.path, index) for index in indices]
        with self.writing(), ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write_image, paths, images))

    def count(self, images: int, seconds: float, calls: int, full: int) -> None:
        """Keep in the record that n more images were written, and what they took."""
        self.sampled = Sampled(self.sampled.images + images, self.sampled.seconds + seconds, calls, full)
        self._save()

    def read(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` images, (H, W, 3) uint8 each. Raises UserError if one cannot be read."""
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, count, CHUNK):
                numbers = range(start, min(start + CHUNK, count))
                yield from pool.map(read_image, [image_path(self.path, number) for number in numbers])

    def collect(self, labels: np.ndarray) -> None:
        """Write the .npz with the first images and their labels (N,) beside the folder. UserError if it cannot be."""
        with writing(str(self.npz), ALL_THERE):
            write_npz(self.npz, self.read(len(labels)), labels)

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
    """What a command of `haste sample` left: images with their labels (N,), and the folder.

    new: how many of them this command sampled; the others were there.
    """

    labels: np.ndarray
    folder: SampleDir
    new: int

    @cached_property
    def images(self) -> np.ndarray:
        """All of them in memory, (N, H, W, 3) uint8."""
        return np.stack(list(self.folder.read(len(self.labels))))

    @property
    def sampled(self) -> Sampled:
        return self.folder.sampled


CALIBRATION_IMAGES = 8


def fill(sampler: Sampler, folder: SampleDir, count: int, batch_size: int, processes: Processes) -> int:
    """Sample the images below `count` that the folder lacks, under a progress bar; how many those were.

    The processes go in rounds, a batch each, and the first one keeps the record. So whatever ends them, all images that
    were sampled are there, and counted up to the last round.
    """
    missing = processes.agree(lambda: folder.missing(count))
    batches = deal(missing, min(batch_size, math.ceil(count / processes.count)))
    if batches:
        largest = max(map(len, batches))
        check_memory(sampler.loaded.model, sampler.settings, largest, guided=sampler.rows == 2)
        sampler.warm_up(largest)
    with progress_bar(
        total=count, initial=count - len(missing), unit="image", desc="sample", disable=not processes.first
    ) as bar:
        for start in range(0, len(batches), processes.count):
            together = batches[start : start + processes.count]
            own = together[processes.rank] if processes.rank < len(together) else []
            count_now = sum(map(len, together))
            done = bar.n + count_now
            seconds = 0.0
            if own:
                begin = perf_counter()
                images, _ = sampler.sample(own, advance(bar, count_now))
                seconds = perf_counter() - begin
                folder.write(own, images)
            slowest = max(processes.gather(seconds))
            if processes.first:
                folder.count(count_now, slowest, *sampler.calls)
                bar.update(done - bar.n)
    return len(missing)


def deal(missing: list[int], size: int) -> list[list[int]]:
    """Batches of at most `size` numbers, of which one holds the numbers from k·size to (k + 1)·size that are missing.

    So an image shares its batch with the same others whichever process samples it, and after a resumption too: its
    matrix products are rounded alike.
    """
    return [list(batch) for _, batch in groupby(missing, key=lambda index: index // size)]


def advance(bar, images: int) -> Callable[[int, int], None]:
    """Moves the bar by whole images while the steps of one round go by."""
    base = bar.n

    def progress(step: int, steps: int) -> None:
        bar.update(base + images * step // steps - bar.n)

    return progress


def settle_full_steps(sampler: Sampler, folder: SampleDir, processes: Processes) -> Sampler:
    """For --error-threshold: a sampler whose full steps are the same for all images of the command.

    Which they are is measured once, and always on the same images of the seed, however many are asked for; a folder
    that was begun keeps them. Otherwise an image would depend on those that share its batch or its command.
    """
    if not sampler.settings.error_threshold:
        return sampler
    if folder.full_steps is None:
        folder.full_steps = processes.agree(lambda: measure_full_steps(sampler))
    steps = folder.full_steps
    error, total = sampler.settings.error_threshold, sampler.settings.num_steps
    logger.info("--error-threshold %g: %d of %d steps are full, %s", error, len(steps), total, describe_steps(steps))
    return sampler.with_full_steps(steps)


def measure_full_steps(sampler: Sampler) -> list[int]:
    """The full steps that an adaptive schedule finds: a function of the weights, the settings and the seed alone."""
    sampler.sample(range(CALIBRATION_IMAGES))
    steps = sampler.cache.full_steps
    sampler.cache.release()
    return steps


# In the grid. Of images wider than SMALL fewer are shown, as they are shown in their own size.
SMALL, MANY, FEW = 64, 100, 40


def sample(
    checkpoint: LoadedCheckpoint | Path | str,
    labels: int | str | Sequence[int] | np.ndarray | torch.Tensor | None = None,
    *,
    num_images: int | None = None,
    batch_size: int = 128,
    folder: Path | str | None = None,
    **settings: Any,
) -> np.ndarray:
    """Sample images.

    An image depends on the checkpoint, the settings, `global_seed` and its number alone: the first ten of a hundred are
    the ten of another call, up to the rounding of matrix products of other sizes.

    Args:
        checkpoint: a checkpoint file of haste, HASTE, REPA or SiT, the folder of a run (its newest whole checkpoint),
            or what `load_checkpoint` returned.
        labels: classes, taken in turn; or "random" (the default), "balanced", or a text file with a class on each line.
        num_images: how many. None: one for each label, or 16.
        batch_size: images at a time; changes the speed and the memory.
        folder: also write PNGs, an .npz and a grid into a folder in there, as `haste sample --sample-dir` does: images
            that are there already are not sampled again.
        settings: fields of SamplingConfig, such as num_steps, mode, cfg_scale, global_seed, ema and vae, and of
            CacheConfig, such as cache and interval; fast=True for the recommended cache.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        UserError: settings or a checkpoint that cannot work, by the flag that would set them; a folder of other images.
        TypeError: a setting that there is not.
    """
    loaded = checkpoint if isinstance(checkpoint, LoadedCheckpoint) else None
    listed = None if labels is None or isinstance(labels, str) else np.atleast_1d(np.asarray(labels)).tolist()
    count = num_images if num_images is not None else 16 if listed is None else len(listed)
    args = SampleConfig(
        ckpt=loaded.checkpoint if loaded is not None else Path(checkpoint).expanduser(),  # type: ignore[arg-type]
        labels=str(labels or "random") if listed is None else ",".join(map(str, listed)),
        num_fid_samples=count,
        per_proc_batch_size=batch_size,
        sample_dir=None if folder is None else Path(folder),
        **settings,
    )
    if folder is not None:
        return sample_to_folder(args, loaded).images
    args = args.resolved()
    args.check()
    sampler = Sampler(loaded or _load(args, None), args)
    if args.error_threshold:
        sampler = sampler.with_full_steps(measure_full_steps(sampler))
    return np.concatenate([sampler.sample(numbers)[0] for numbers in deal(list(range(count)), batch_size)])


def _load(args: SampleConfig, device: torch.device | None) -> LoadedCheckpoint:
    return load_checkpoint(
        args.ckpt,
        args.ema,
        device=device,
        fused_attn=args.fused_attn,
        assume=args.assumed(),
        convention=args.convention,
    )


def sample_to_folder(args: SampleConfig, loaded: LoadedCheckpoint | None = None) -> Samples:
    """Sample what is missing of a command's images and write the .npz and the grid; every process takes part.

    loaded: the model behind args.ckpt, if that has been loaded.
    Raises UserError for settings or a checkpoint that cannot work, and for a folder that belongs to another command.
    """
    args = args.resolved()
    args.check()
    processes = Processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    loaded = loaded or _load(args, processes.device)
    sampler = Sampler(loaded, args)
    args.refuse_other(loaded, 1 if sampler.latents is None else sampler.latents.factor)
    count = args.num_fid_samples
    labels = choose_labels(args.labels, args.global_seed, range(count), loaded.layout.num_classes)
    with ExitStack() as stack:

        def open_folder() -> SampleDir:
            settings = settings_record(args, sampler)
            before = as_before(settings, loaded.checkpoint)
            folder = SampleDir(folder_path(args, loaded), settings, before=before)
            stack.enter_context(folder.hold())
            return folder

        folder = processes.agree(open_folder)
        sampler = settle_full_steps(sampler, folder, processes)
        sampler.speed_up(args.compile, args.cuda_graphs)
        new = fill(sampler, folder, count, args.per_proc_batch_size, processes)

        def finish() -> None:
            folder.collect(labels)
            with writing(str(folder.grid), ALL_THERE):
                write_grid(args, loaded, folder, labels)

        processes.agree(finish)
    return Samples(labels, folder, new)


def folder_path(args: SampleConfig, loaded: LoadedCheckpoint) -> Path:
    """<sample_dir>/<checkpoint>-<sampler>-<steps>...: the settings that people vary are in the name."""
    return (args.sample_dir or loaded.run / "samples") / f"{loaded.checkpoint.stem}-{args.short_name()}"


def settings_record(args: SampleConfig, sampler: Sampler) -> dict:
    """Everything that decides the images, for sample.json."""
    path_type = sampler.loaded.config.path_type
    path = {} if path_type == "linear" else {"path_type": path_type}
    vae = {} if sampler.latents is None else {"vae": sampler.latents.vae}
    identity = checkpoint_identity(sampler.loaded.checkpoint)
    convention = {"convention": "sit"} if sampler.loaded.rounded else {}  # how it is guided and rounded
    return {**identity, **args.sampling_fields(), **vae, **path, **convention}


def write_grid(args: SampleConfig, loaded: LoadedCheckpoint, folder: SampleDir, labels: np.ndarray) -> None:
    """The labelled grid of the first images, in the order of their labels."""
    from haste.plotting import plot_grid

    (first,) = folder.read(1)
    shown = min(len(labels), MANY if first.shape[1] <= SMALL else FEW)
    images = np.stack(list(folder.read(shown)))
    order = np.argsort(labels[:shown], kind="stable")
    names = dict(enumerate(loaded.recorded.get("class_names") or ()))
    titles = [names.get(label, str(label)) for label in labels[order].tolist()]
    plot_grid(folder.grid, images[order], titles, title=f"{loaded.label}: {args.describe()}")
