"""The order of the training images, a function of the step, and batches prefetched by worker processes."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from haste.data.dataset import Batch, TrainingData
from haste.errors import BadFile, UserError, in_one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

    from haste.training.config import TrainConfig

logger = logging.getLogger(__name__)


class BatchOrder:
    """Shuffled epochs end to end, cut into batches.

    Batch number s has the positions s·B to (s+1)·B − 1 of the stream, whose epoch e is a permutation by the seed and e.
    So a run resumes at any step without replaying the steps before, each image is used once per epoch, and a batch may
    span two epochs.

    Raises:
        ValueError: num_samples or batch_size is below 1.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples is {num_samples} and batch_size {batch_size}; both must be at least 1")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> torch.Tensor:
        """Indices (batch_size,), int64, of the images of batch number `step`, counted from 0."""
        position = step * self.batch_size
        end = position + self.batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            part = self._epoch_order(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return torch.cat(parts)

    def local_batch(self, step: int, process_index: int, num_processes: int) -> torch.Tensor:
        """The contiguous part of batch number `step` for one of several processes."""
        return self.batch(step).chunk(num_processes)[process_index]

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.num_samples, generator=generator)
            self._epoch = epoch
        return self._permutation


# torch warns for each loader, and again when it starts; `useful_workers` warns once.
warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)

# More files in a row that cannot be used are an error also with --on-bad-file skip.
MOST_BAD_NEIGHBOURS = 100


def batches(
    data: TrainingData,
    order: BatchOrder,
    start_step: int = 0,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """Yield batches without end, from `start_step` on.

    With data.on_bad_file "skip" a file that cannot be used is replaced by the next one that can, always the same, and
    listed in data.skipped.

    Args:
        num_workers: processes that prefetch.
        process_index, num_processes: each process gets its contiguous local batch.
        generator: of the random numbers of a batch, which are sampled when it is yielded, so that a resumed run has the
            same; None for torch's global one.

    Raises:
        UserError: a file cannot be used.
    """
    if order.batch_size % num_processes:
        raise UserError(
            f"--batch-size must be a multiple of {num_processes}, the number of processes, got {order.batch_size}"
        )
    device = torch.device(device)
    reader = _Reader(data, order.seed)
    workers = useful_workers(num_workers, len(data)) if data.reads_files else 0
    loader = DataLoader(
        reader,
        batch_sampler=_LocalBatches(order, start_step, process_index, num_processes),
        collate_fn=reader.collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # for the workers' seeds, to leave torch's global one alone
    )
    return _deliver(data, loader, device, generator)


def useful_workers(num_workers: int, most: int) -> int:
    """--num-workers, but at most `most`; logs a warning if there are fewer cores."""
    workers = min(num_workers, most)
    warn_of_cores(workers)
    return workers


@functools.cache
def warn_of_cores(num_workers: int) -> None:
    """Log once that there are fewer cores than workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > cores:
        logger.warning("--num-workers %d exceeds the %d cores; fewer may be faster", num_workers, cores)


def _deliver(
    data: TrainingData, loader: DataLoader, device: torch.device, generator: torch.Generator | None
) -> Iterator[Batch]:
    for raw, faults in prefetch(loader):
        if faults and data.on_bad_file == "refuse":
            raise faults[0].as_user_error()
        for fault in faults:
            if fault.name not in data.skipped:
                data.skipped[fault.name] = fault.reason
                logger.warning("skipped: %s (%d so far)", fault, len(data.skipped))
        if raw is None:
            raise UserError(f"--on-bad-file skip found no file to replace bad ones; the last tried: {faults[-1]}")
        yield data.to_batch(raw, device, generator)


class _Reader:
    """Reads in worker processes. Returns errors, since DataLoader would wrap exceptions in a long traceback."""

    def __init__(self, data: TrainingData, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, list[BadFile]]:
        """Of an image's number, and its position in the stream of all epochs."""
        index, position = place
        chance = int(np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0])
        attempts = 1 if self.data.on_bad_file == "refuse" else min(len(self.data), MOST_BAD_NEIGHBOURS)
        faults: list[BadFile] = []
        for offset in range(attempts):
            try:
                return self.data.read((index + offset) % len(self.data), chance), faults
            except BadFile as fault:
                faults.append(fault)
        return None, faults

    def collate(self, pairs: list[tuple[Any, list[BadFile]]]) -> tuple[Any, list[BadFile]]:
        samples = [sample for sample, _ in pairs]
        faults = [fault for _, found in pairs for fault in found]
        whole = all(sample is not None for sample in samples)
        return self.data.collate(samples) if whole else None, faults


@dataclass
class _LocalBatches:
    """The indices of one process's local batches with their positions in the stream, without end."""

    order: BatchOrder
    start_step: int
    process_index: int
    num_processes: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.order.batch_size // self.num_processes
        for step in itertools.count(self.start_step):
            indices = self.order.local_batch(step, self.process_index, self.num_processes).tolist()
            first = step * self.order.batch_size + self.process_index * size
            yield list(zip(indices, range(first, first + size), strict=True))


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals except for a SIGTERM of the parent process.

    Ctrl-C and a cluster's SIGTERM reach every process of a job. The parent saves and then ends its workers; if they
    ended first, it would wait for them forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_at_sigterm_of_the_parent, daemon=True).start()


def _end_at_sigterm_of_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def prefetch(loader: DataLoader) -> Iterator[Any]:
    """Yield from a loader. Raises UserError if a worker was killed, usually for lack of memory."""
    on_child = signal.getsignal(signal.SIGCHLD)
    # Workers start with these blocked: libraries start threads in them before leave_signals_to_the_parent runs, and a
    # SIGTERM to one thread ends the process.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise anywhere in the caller; without it the next read raises.
        signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a worker process was killed: {in_one_line(error)}") from error


class Loader:
    """The local batches of this process in a training run.

    The random numbers of a batch, such as of latents sampled from their mean and standard deviation, are a function of
    the seed, the micro-batch and the process, and need not be saved.

    Args:
        start: first step.
        images: whether a teacher needs the images.
    """

    def __init__(
        self, data: TrainingData, config: TrainConfig, accelerator: Accelerator, start: int, images: bool
    ) -> None:
        self.data = data if images else data.without_images()
        self.config = config
        self.accelerator = accelerator
        self.chance = torch.Generator(accelerator.device)
        order = BatchOrder(len(data), config.batch_size, config.seed)
        self._batches = self._local(order, start * config.gradient_accumulation_steps)

    def _local(self, order: BatchOrder, start: int) -> Iterator[Batch]:
        return batches(
            self.data,
            order,
            start,
            self.accelerator.device,
            self.config.num_workers,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.chance,
        )

    def next(self, step: int, number: int) -> Batch:
        """The local batch of a step's micro-batch with this number. To be called in order."""
        self._seed(step * self.config.gradient_accumulation_steps + number)
        return next(self._batches)

    def probe(self) -> Iterator[Batch]:
        """The batches of a probe, the same ones every time. They have half the size, as a probe computes in fp32."""
        processes = self.accelerator.num_processes
        size = max(1, self.config.batch_size // processes // 2) * processes
        self._seed(0)
        count = max(1, min(self.config.probe_images, len(self.data)) // size)
        return itertools.islice(self._local(BatchOrder(len(self.data), size, seed=0), 0), count)

    def close(self) -> None:
        """End the worker processes."""
        self._batches.close()  # type: ignore[attr-defined]

    def _seed(self, number: int) -> None:
        entropy = (self.config.seed, number, self.accelerator.process_index)
        self.chance.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
