"""Carries out `haste sample`: draws the missing images of a folder, and writes its .npz and its grid."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from haste.cli.flags.sample import Args
from haste.distributed import Processes
from haste.generation.checkpoint import LoadedCheckpoint, load_checkpoint
from haste.generation.pipeline import Sampler, choose_labels
from haste.generation.sample_dir import ALL_THERE, SampleDir, Samples, fill, settle_full_steps
from haste.io import writing
from haste.training.checkpoint import as_before, checkpoint_identity

# In the grid. Of images wider than SMALL fewer are shown, as they are shown in their own size.
SMALL, MANY, FEW = 64, 100, 40


def main(args: Args) -> None:
    """Draw, and say what came out."""
    processes = Processes()
    # Of several processes one tells what happens, all tell what is wrong.
    logging.basicConfig(level=logging.INFO if processes.first else logging.WARNING, format="%(message)s")
    samples = sample_to_folder(args)
    if processes.first:
        report(samples)
    processes.leave()


def report(samples: Samples) -> None:
    """Print how fast images came, unless all were there, and where they are."""
    folder, drawn, count = samples.folder, samples.drawn, len(samples.labels)
    if samples.new:
        speed = f"{drawn.images_per_second:.1f} images/s ({drawn.seconds:.2f} s for {drawn.images})"
        came = f"{count} images at {speed}"
    else:
        came = f"{count} images were there already"
    print(f"{came}; {drawn.full_per_image} of {drawn.evaluations_per_image} model evaluations were full")
    print(f"images  {folder.path}\nnpz       {folder.npz}\ngrid      {folder.grid}")


def sample_to_folder(args: Args) -> Samples:
    """Draw what is missing of a command's images and write the .npz and the grid; every process takes part.

    Raises UserError for settings or a checkpoint that cannot work, and for a folder that belongs to another command.
    """
    args = args.resolved()
    args.check()
    processes = Processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    student = load_checkpoint(
        args.ckpt,
        args.ema,
        device=processes.device,
        fused_attn=args.fused_attn,
        assume=args.assumed(),
        convention=args.convention,
    )
    sampler = Sampler(student, args)
    args.refuse_other(student.model, student.recorded, 1 if sampler.latents is None else sampler.latents.factor)
    count = args.num_fid_samples
    labels = choose_labels(args.labels, args.global_seed, range(count), student.model.num_classes)
    with ExitStack() as stack:

        def open_folder() -> SampleDir:
            settings = settings_record(args, sampler)
            before = as_before(settings, student.checkpoint)
            folder = SampleDir(folder_path(args, student), settings, before=before)
            stack.enter_context(folder.hold())
            return folder

        folder = processes.agree(open_folder)
        sampler = settle_full_steps(sampler, folder, processes)
        sampler.speed_up(args.compile, args.cuda_graphs)
        new = fill(sampler, folder, count, args.per_proc_batch_size, processes)

        def finish() -> None:
            folder.collect(labels)
            with writing(str(folder.grid), ALL_THERE):
                write_grid(args, student, folder, labels)

        processes.agree(finish)
    return Samples(labels, folder, new)


def folder_path(args: Args, student: LoadedCheckpoint) -> Path:
    """<sample_dir>/<checkpoint>-<sampler>-<steps>...: the settings that people vary are in the name."""
    return (args.sample_dir or student.run / "samples") / f"{student.checkpoint.stem}-{args.short_name()}"


def settings_record(args: Args, sampler: Sampler) -> dict:
    """Everything that decides the images, for sample.json."""
    path_type = sampler.student.config.path_type
    path = {} if path_type == "linear" else {"path_type": path_type}
    vae = {} if sampler.latents is None else {"vae": sampler.latents.vae}
    identity = checkpoint_identity(sampler.student.checkpoint)
    convention = {"convention": "sit"} if sampler.student.rounded else {}  # how it is guided and rounded
    return {**identity, **args.sampling_fields(), **vae, **path, **convention}


def write_grid(args: Args, student: LoadedCheckpoint, folder: SampleDir, labels: np.ndarray) -> None:
    """The labelled grid of the first images, in the order of their labels."""
    from haste.plotting import plot_grid

    (first,) = folder.read(1)
    shown = min(len(labels), MANY if first.shape[1] <= SMALL else FEW)
    images = np.stack(list(folder.read(shown)))
    order = np.argsort(labels[:shown], kind="stable")
    names = dict(enumerate(student.recorded.get("class_names", ())))
    titles = [names.get(label, str(label)) for label in labels[order].tolist()]
    plot_grid(folder.grid, images[order], titles, title=f"{student.label}: {args.describe()}")
