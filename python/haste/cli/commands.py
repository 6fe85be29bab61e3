"""The commands of `haste`, one function each: its docstring is the help, its argument the checked settings.

Each function imports its subject itself, so that help and refusals come without torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from haste.errors import OnBadFile, UserError
from haste.validation import check_numbers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from haste.cli.demo import DemoConfig
    from haste.data.caption_folder import CaptionFolder
    from haste.data.prepare import Destination
    from haste.data.sources import ImageSource
    from haste.distributed import StopRequest
    from haste.evaluation.config import EvaluateConfig
    from haste.generation.config import SampleConfig
    from haste.generation.sample_dir import Samples
    from haste.sweep.config import SweepConfig
    from haste.training.config import TrainConfig
    from haste.vae import VAE


# ---- haste prepare ----

DEFAULT_TEXT_ENCODER = "openai/clip-vit-large-patch14"  # haste.text.CLIP_L's
DEFAULT_LATENTS_DIR = "vae-sd"  # haste.data.latent_folders.LATENTS


@dataclass(kw_only=True)
class PrepareConfig:
    """The settings of `haste prepare`, which are its flags."""

    source: Path | None = None
    """Folder, zip or Hugging Face data set of images, or a tar or a folder of tars of webdataset. Labels: a
    dataset.json, or the top folders in sorted order; of tars .cls. With --captions only for images that are not found
    beside them."""
    dest: Path
    """Output folder, to be used as --data-dir of haste train."""
    captions: Path | None = None
    """Images with captions, for text to image: annotations/captions_*.json of MS-COCO, a folder or zip of images with a
    .txt for each (one caption a line), a tar or a folder of webdataset's tars, or a Hugging Face data set."""
    text_encoder: str = DEFAULT_TEXT_ENCODER
    """Text encoder of the captions: a hub name, or a folder of save_pretrained()."""
    layout: Literal["shards", "repa"] = "shards"
    """With --captions: shards, which are small and train fast, or REPA's coco256_features."""
    resolution: int = 256
    """Image resolution in pixels after the center crop."""
    vae: str = "mse"
    """VAE that encodes the latents: mse or ema (Stable Diffusion's), a hub name or a folder (AutoencoderKL, DC-AE or
    RAE), or a file such as MAR's kl16.ckpt or VA-VAE's; none for images only."""
    latents_dir: str = DEFAULT_LATENTS_DIR
    """Folder of the latents, beside images/ in --dest."""
    flip: bool = False
    """Write the latents of the mirror images as well, for --random-flip of haste train; also into a finished --dest."""
    zip: bool = False
    """Pack each folder of the output into a zip."""
    on_bad_file: OnBadFile = "refuse"
    """Stop at an image that cannot be read, or skip it with a warning."""
    batch_size: int = 32
    """Batch size for the VAE."""
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Number of worker processes that read and crop images. [default: the number of cores]"""

    def check(self) -> None:
        """Raise UserError for numbers out of bounds, a destination inside the source, and flags that need another."""
        check_numbers(self)
        for flag, path in (("source", self.source), ("captions", self.captions)):
            if path is not None and self.dest.expanduser().resolve().is_relative_to(path.expanduser().resolve()):
                raise UserError(f"--dest must be a folder outside --{flag}, got {self.dest}")
        if self.captions is None:
            self._check_without_captions()
        else:
            self._check_with_captions()

    def _check_with_captions(self) -> None:
        for flag, given in {
            "zip": self.zip,
            "flip": self.flip,
            "latents-dir": self.latents_dir != DEFAULT_LATENTS_DIR,
        }.items():
            if given:
                raise UserError(f"--{flag} must be left out with --captions, got both")
        if self.layout == "repa" and self.vae.lower() == "none":
            raise UserError("--vae must be a VAE with --layout repa, whose data are latents, got none")

    def _check_without_captions(self) -> None:
        from haste.training.config import check_folder_name

        if self.source is None:
            raise UserError("--source must be given, or --captions for images with captions, got neither")
        given = {"text-encoder": self.text_encoder != DEFAULT_TEXT_ENCODER, "layout": self.layout != "shards"}
        for flag, value in given.items():
            if value:
                raise UserError(f"--{flag} must come with --captions, got it alone")
        if self.flip and self.vae.lower() == "none":
            raise UserError("--vae must be a VAE with --flip, which writes latents of mirror images, got none")
        check_folder_name("latents_dir", self.latents_dir)
        if self.latents_dir == "images" or self.latents_dir.endswith(("-flip", ".zip", ".json", ".pt")):
            raise UserError(
                f"--latents-dir must not be images, end in -flip or be the name of a file, got {self.latents_dir}"
            )
        if self.latents_dir != DEFAULT_LATENTS_DIR and self.vae.lower() == "none":
            raise UserError(f"--latents-dir must be left out with --vae none, got {self.latents_dir}")


def prepare(config: PrepareConfig) -> None:
    """Make training data from any images: cropped, with their latents, and with features of their captions if any.

    `--source` is a folder with a folder of images for each class, a zip of one, or a Hugging Face data set on disk:
    REPA's layout, cropped as ADM does. `--captions` are images with captions, for text to image, cropped as U-ViT and
    REPA do for MS-COCO. A command that was stopped resumes with what is missing. `accelerate launch -m haste
    prepare ...` shares the work among several GPUs.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    show_messages()
    # One of several processes may finish hours before another.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    if config.captions is None:
        prepare_classes(config, accelerator)
    else:
        prepare_captions(config, config.captions.expanduser(), accelerator)


def prepare_classes(config: PrepareConfig, accelerator: Accelerator) -> None:
    """Images with labels, in REPA's layout."""
    from haste.data.prepare import Destination
    from haste.data.sources import open_source
    from haste.distributed import in_first
    from haste.vae import VAE, LatentFormat

    assert config.source is not None  # as checked
    source = open_source(config.source.expanduser(), "--source", config.on_bad_file)
    latents = None if config.vae.lower() == "none" else LatentFormat.of(config.vae, resolution=config.resolution)
    folder = config.dest.expanduser()
    destination = Destination(folder, source, config.resolution, latents, config.latents_dir, config.flip)
    with ExitStack() as stack:
        in_first(lambda: stack.enter_context(destination.hold()))
        if not destination.finished:
            prepare_missing(config, accelerator, source, destination, None if latents is None else VAE(latents))
        measure_latents(accelerator, destination)
        if accelerator.is_main_process:
            if config.zip:
                destination.pack()
            print(f"{destination.path} is ready for haste train --data-dir")


def prepare_missing(
    config: PrepareConfig, accelerator: Accelerator, source: ImageSource, destination: Destination, vae: VAE | None
) -> None:
    """Write this process's part of the missing files and, once all are there, the labels."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from haste.data.prepare import Preparation
    from haste.distributed import StopRequest, progress_bar

    if accelerator.is_main_process:
        destination.check_space(config.zip)
        destination.create()
    accelerator.wait_for_everyone()
    vae = vae.to(accelerator.device) if vae is not None else None
    preparation = Preparation(
        source, destination, config.resolution, vae, config.batch_size, config.num_workers, config.on_bad_file
    )
    part = range(accelerator.process_index, len(source), accelerator.num_processes)
    missing = destination.missing(part)
    bar = progress_bar(total=len(part), initial=len(part) - len(missing), unit="image", desc="prepare")
    with bar, logging_redirect_tqdm(), StopRequest() as stop:
        for count in preparation.run(missing):
            bar.update(count)
            if stop.received is not None:
                break
    exit_if_stopped(stop)
    if preparation.faults:
        print(f"{len(preparation.faults)} of {len(part)} images cannot be read and are left out")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        destination.finish(source.labels)


def measure_latents(accelerator: Accelerator, destination: Destination | CaptionFolder) -> None:
    """Write the mean and standard deviation of each latent channel beside the latents, where they are not yet there."""
    from accelerate.utils import gather_object

    from haste.data.latent_statistics import STATISTICS, measure, merged, write_statistics
    from haste.distributed import progress_bar

    accelerator.wait_for_everyone()  # until the first has left out what could not be read
    path, units = destination.path / STATISTICS, destination.latent_units()
    if path.is_file() or units == 0:  # for all processes alike, as the first writes after all have measured
        return
    own = range(accelerator.process_index, units, accelerator.num_processes)
    try:
        with progress_bar(total=len(own), unit="part", desc="statistics") as bar:
            found = measure(destination, own, bar.update)
    except UserError:  # of a damaged file: the same command makes it again only in an unfinished folder
        destination.write_record({**(destination.saved or destination.settings), "finished": False})
        raise
    parts = gather_object([found]) if accelerator.num_processes > 1 else [found]
    statistics = merged(parts)
    if accelerator.is_main_process and statistics is not None:
        with destination.writing():
            write_statistics(path, statistics)


def exit_if_stopped(stop: StopRequest) -> None:
    """Exit with a line for the user if a signal has asked for it."""
    if stop.received is not None:
        print(f"haste prepare: stopped by {stop.received.name}; the same command resumes from there", file=sys.stderr)
        raise SystemExit(128 + stop.received)


def prepare_captions(config: PrepareConfig, captions: Path, accelerator: Accelerator) -> None:
    """Images with captions, in either layout."""
    from haste.data.caption_sources import open_captioned
    from haste.data.prepare_captions import LAYOUTS
    from haste.distributed import in_first
    from haste.text import TextFormat
    from haste.vae import LatentFormat

    images = None if config.source is None else config.source.expanduser()
    source = open_captioned(captions, images, "--captions", config.on_bad_file)
    latents = None if config.vae.lower() == "none" else LatentFormat.of(config.vae, resolution=config.resolution)
    text = TextFormat.of(config.text_encoder)
    destination = LAYOUTS[config.layout](config.dest.expanduser(), source, config.resolution, latents, text)
    with ExitStack() as stack:
        in_first(lambda: stack.enter_context(destination.hold()))
        if not destination.finished:
            prepare_missing_captions(config, accelerator, destination)
        measure_latents(accelerator, destination)
        if accelerator.is_main_process:
            print(f"{destination.path} is ready for haste train --data-dir")


def prepare_missing_captions(config: PrepareConfig, accelerator: Accelerator, destination: CaptionFolder) -> None:
    """Write this process's part of what is missing and, once all is there, the record."""
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers.utils.logging import disable_progress_bar

    from haste.data.caption_folder import Encoders
    from haste.distributed import StopRequest, progress_bar
    from haste.text import TextEncoder
    from haste.vae import VAE

    disable_progress_bar()  # transformers' own, for loading weights
    vae = None if destination.latents is None else VAE(destination.latents).to(accelerator.device)
    text = TextEncoder(destination.text).to(accelerator.device)
    encoders = Encoders(vae, text, config.batch_size, config.num_workers, config.on_bad_file)
    if accelerator.is_main_process:
        destination.check_space()
        destination.create(encoders)
    accelerator.wait_for_everyone()
    for stage in destination.stages(encoders, accelerator.process_index, accelerator.num_processes):
        bar = progress_bar(total=stage.total, initial=stage.done, unit=stage.name[:-1], desc=stage.name)
        with bar, logging_redirect_tqdm(), StopRequest() as stop:
            for count in stage.run:
                bar.update(count)
                if stop.received is not None:
                    break
        exit_if_stopped(stop)
    if encoders.faults:
        print(f"{len(encoders.faults)} images or captions cannot be read and are left out")
    if text.truncated:
        print(f"{text.truncated} captions of more than {destination.text.tokens} tokens are truncated")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        destination.finish()


# ---- haste train ----


def list_presets_if_asked(arguments: Sequence[str]) -> None:
    """Print all presets and exit if --preset has no name."""
    for word, following in pairwise([*arguments, "--"]):
        if word == "--preset" and following.startswith("--"):
            from haste.training.config import list_presets

            print(list_presets())
            raise SystemExit(0)


def train(config: TrainConfig) -> None:
    """Train a diffusion transformer with HASTE, with REPA, or vanilla.

    The quickest look: `haste train --preset digits` trains on real handwritten digits, in minutes without a GPU.
    `haste train --preset` lists all presets with their settings. The same command again resumes from the last
    checkpoint; settings that are not given keep the run's values. On several GPUs: `accelerate launch -m haste train`.
    """
    from transformers.utils.logging import disable_progress_bar

    from haste.training import trainer

    disable_progress_bar()  # transformers' own, for loading weights; downloads still show theirs
    first = os.environ.get("RANK", "0") == "0"
    show_messages(first)
    result = trainer.train(config)
    if result.interrupted is not None:
        if first:
            print(
                f"haste train: stopped by {result.interrupted.name} after step {result.step}, which is saved; "
                "the same command resumes from there",
                file=sys.stderr,
            )
        raise SystemExit(128 + result.interrupted)
    if first:
        print(f"trained {result.step} steps; everything is in {result.folder}")


# ---- haste sample ----


def sample(config: SampleConfig) -> None:
    """Sample images from a checkpoint: PNGs, an .npz for evaluators, and a grid to look at.

    The flags are those of REPA's and HASTE's generate.py, and their checkpoints, SiT's and DiT's are read as well as
    those of `haste train`. `--fast` computes only some steps in full and forecasts the others; `--cache` chooses how. A
    command that was stopped resumes with the images that are missing. A model of text is given `--prompts`: a text, a
    file of them, or the captions of a data set, which stay beside the images.

    On several GPUs: `torchrun --nproc_per_node 8 -m haste sample ...`, or `accelerate launch -m haste sample ...`.
    """
    from haste.distributed import Processes
    from haste.generation.sample_dir import sample_to_folder

    processes = Processes()
    show_messages(processes.first)
    samples = sample_to_folder(config)
    if processes.first:
        print_samples(samples)
    processes.leave()


def print_samples(samples: Samples) -> None:
    """Print how fast images came, unless all were there, and where they are."""
    folder, sampled, count = samples.folder, samples.sampled, len(samples.labels)
    if samples.new:
        speed = f"{sampled.images_per_second:.1f} images/s ({sampled.seconds:.2f} s for {sampled.images})"
        full = f"{sampled.full_per_image} of {sampled.calls_per_image} model calls were full"
        print(f"{count} images at {speed}; {full}")
    else:
        print(f"{count} images were there already")
    held = folder.held
    part = f", the first {count} of the folder's {held} images" if held > count else ""
    print(f"images  {folder.path}\nnpz       {folder.npz}{part}\ngrid      {folder.grid}")


# ---- haste export ----


@dataclass(kw_only=True)
class ExportConfig:
    """The settings of `haste export`, which are its flags."""

    ckpt: Path
    """Checkpoint file of a DiT, or run folder for its latest checkpoint."""
    to: Path
    """The folder of the pipeline, which must be new."""
    ema: bool = True
    """Write the EMA weights."""
    ema_decay: float | None = None
    """Decay of the EMA to write, of a run with --extra-ema-decays. [default: the run's --ema-decay]"""
    vae: str | None = None
    """VAE of the pipeline, as --vae of haste sample; none for the transformer and its scheduler alone. [default: the
    one of training; ema for Stable Diffusion's latents]"""
    fit_times: bool = True
    """Fit the embedding of times to diffusers' frequencies, so that the pipeline computes what the model does. Without,
    it has DiT's weights as they are, like the published pipelines."""
    convention: Literal["repa", "sit", "dit"] | None = None
    """Trainer of a checkpoint that does not record it."""

    def check(self) -> None:
        """Raise UserError for a folder inside the checkpoint's."""
        source, folder = self.ckpt.expanduser().resolve(), self.to.expanduser().resolve()
        if folder == source:
            raise UserError(f"--to must be another folder than --ckpt, got {self.to}")
        if self.ema_decay is not None and not self.ema:
            raise UserError(f"--ema-decay must be left out with --no-ema, got {self.ema_decay!r}")


def export(config: ExportConfig) -> None:
    """Write a trained DiT as a folder that diffusers' DiTPipeline.from_pretrained loads: transformer, scheduler, VAE.

    With the DDIM scheduler that is written, the pipeline makes the images of `haste sample --timestep-spacing leading
    --guided-channels 4`. Such a folder, or a published one, is read back wherever a checkpoint is.
    """
    from haste.generation.export import export_pipeline

    show_messages()
    print(export_pipeline(
        config.ckpt,
        config.to,
        ema=config.ema if config.ema_decay is None else config.ema_decay,
        vae=config.vae,
        fit_times=config.fit_times,
        convention=config.convention,
    ))  # fmt: skip


# ---- haste evaluate, sweep, report, demo ----


def evaluate(config: EvaluateConfig) -> None:
    """Measure how far samples are from real images, and how far a cached run is from its uncached baseline.

    Give exactly one of --run (every checkpoint of a run), --ckpt (one checkpoint) or --samples (images that are there).
    The images of --run and --ckpt are sampled first. --clip reports the CLIP score of images with captions. Of a run on
    the digits, every checkpoint is evaluated by FD and label accuracy; all else gets every metric that its features and
    its reference allow.
    """
    from haste.evaluation.runs import evaluate_config

    show_messages()
    print(f"\n{evaluate_config(config)}")


def sweep(config: SweepConfig) -> None:
    """Plot the trade-off of feature caching: quality against seconds, FLOPs and memory, beside uncached runs.

    Every combination of the lists is sampled from one checkpoint, evaluated and timed; the table and the plot say which
    of them are worth it. Combinations that are impossible are skipped with a line. A sweep that was stopped resumes
    where it stopped.
    """
    from haste.sweep.measure import run_sweep

    show_messages()
    run_sweep(config)


@dataclass(kw_only=True)
class ReportConfig:
    """The settings of `haste report`, which are its flags."""

    runs: Annotated[tuple[Path, ...], Positional]
    """Folders of runs, such as exps/digits."""
    output: Path | None = None
    """The page. None: report.html, in the run's folder if there is one run, else here."""

    def check(self) -> None:
        """Raise UserError if no run is given, or one twice."""
        if not self.runs:
            raise UserError("RUNS must be one or more folders of runs, such as exps/digits, got none")
        places = [folder.expanduser().resolve() for folder in self.runs]
        twice = next((folder for folder, place in zip(self.runs, places, strict=True) if places.count(place) > 1), None)
        if twice is not None:
            raise UserError(f"RUNS must be different folders, got {twice} more than once")


def report(config: ReportConfig) -> None:
    """One page about one run, or several side by side: quality, curves, samples, throughput, end of alignment,
    settings.

    The page is one file that needs no network. It can be made while the runs are still training.
    """
    from haste.io import writing
    from haste.report.page import is_page
    from haste.report.runs import read_run, write_report

    page = config.output or (config.runs[0] if len(config.runs) == 1 else Path()) / "report.html"
    if config.output is not None and os.path.lexists(page) and not is_page(page):
        raise UserError(f"--output must be a new file, or a page of haste report, got {page}")
    runs = [read_run(folder) for folder in config.runs]
    with writing(f"--output {page}"):
        write_report(runs, page)
    print(page.resolve())


def demo(config: DemoConfig) -> None:
    """See HASTE at work on real handwritten digits, on one page: train, sample, evaluate, and look.

    A small vision transformer learns to read scikit-learn's digits. A diffusion transformer learns to make them, once
    aligned with it and once, the baseline, without. The page shows samples, the same noise with most steps forecast,
    and both runs beside each other. Every step is a `haste` command that is printed before it runs. Started again, the
    demo resumes where it stopped.
    """
    from haste.cli.demo import run_demo

    show_messages()
    run_demo(config)


def show_messages(first: bool = True) -> None:
    """Print log messages to stderr; of several processes the first prints all, the others warnings and errors."""
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
