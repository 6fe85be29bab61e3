"""The order of the training images, as a function of the step alone.

Batches in the order of BatchOrder, read ahead by worker processes, from any step on at no cost.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from haste.data.dataset import Batch, TrainingData
from haste.data.images import BadFile, refusal
from haste.errors import UserError, in_one_line

logger = logging.getLogger(__name__)


class BatchOrder:
    """Shuffled epochs end to end, cut into batches.

    Batch number s holds positions s·B to (s+1)·B of the stream; epoch e of the stream is a permutation that depends on
    the seed and e only. So a resumed run continues at any step without replaying the steps before it, every image
    comes once per epoch, and a batch may span two epochs.
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

    def share(self, step: int, process_index: int, num_processes: int) -> torch.Tensor:
        """The contiguous part of batch number `step` that one of several processes works on."""
        return self.batch(step).chunk(num_processes)[process_index]

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.num_samples, generator=generator)
            self._epoch = epoch
        return self._permutation


# torch says it of every loader, and again when it begins to read; `useful_workers` says it once.
warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)

# So many files in a row that cannot be used are no accident.
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
    """Batches without end, from that of `start_step` on; of several processes each gets its contiguous share.

    Reading runs ahead in `num_workers` processes. Random draws do not: those of a batch are made when it is asked
    for, from `generator` or else from torch's own, so that a resumed run draws what an unbroken one would have drawn.

    Raises UserError, in one line, for a file that cannot be used, unless data.on_bad_file is "skip": then the next
    one that can stands in for it, always the same, and data.skipped has its name.
    """
    if order.batch_size % num_processes:
        raise UserError(
            f"--batch-size is {order.batch_size}; it must be a multiple of {num_processes}, the number of processes"
        )
    device = torch.device(device)
    reader = _Reader(data)
    # Batches have no end, so no worker is ever idle; but one for each image is enough of any.
    workers = useful_workers(num_workers, len(data)) if data.reads_files else 0
    loader = DataLoader(
        reader,
        batch_sampler=_Shares(order, start_step, process_index, num_processes),
        collate_fn=reader.collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # DataLoader seeds its workers, who draw nothing; not from the trainer's numbers
    )
    return _deliver(data, loader, device, generator)


def useful_workers(num_workers: int, most: int) -> int:
    """So many of --num-workers as have something to do, `most` at most; tells if these are more than the cores."""
    workers = min(num_workers, most)
    tell_of_cores(workers)
    return workers


@functools.cache
def tell_of_cores(num_workers: int) -> None:
    """A line in the log, once, if there are more workers than cores for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > cores:
        logger.warning("%d workers read, and there are %d cores; fewer --num-workers may be faster", num_workers, cores)


def _deliver(
    data: TrainingData, loader: DataLoader, device: torch.device, generator: torch.Generator | None
) -> Iterator[Batch]:
    for raw, faults in read_ahead(loader):
        _judge(data, faults)
        if raw is None:
            raise UserError(f"no file can stand in for a bad one, up to the last tried: {faults[-1]}")
        yield data.to_batch(raw, device, generator)


def _judge(data: TrainingData, faults: list[BadFile]) -> None:
    """Refuse, or name and count, the files that this batch could not use."""
    if faults and data.on_bad_file == "refuse":
        raise UserError(refusal(faults[0]))
    for fault in faults:
        if fault.name not in data.skipped:
            data.skipped[fault.name] = fault.reason
            logger.warning("skipped: %s (%d so far)", fault, len(data.skipped))


class _Reader:
    """What worker processes run: a sample, or what stood in its way, as values, since DataLoader would wrap an
    exception into a page of traceback."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, list[BadFile]]:
        attempts = 1 if self.data.on_bad_file == "refuse" else min(len(self.data), MOST_BAD_NEIGHBOURS)
        faults = []
        for offset in range(attempts):
            try:
                return self.data[(index + offset) % len(self.data)], faults
            except BadFile as fault:
                faults.append(fault)
        return None, faults

    def collate(self, pairs: list[tuple[Any, list[BadFile]]]) -> tuple[Any, list[BadFile]]:
        samples = [sample for sample, _ in pairs]
        faults = [fault for _, found in pairs for fault in found]
        whole = all(sample is not None for sample in samples)
        return self.data.collate(samples) if whole else None, faults


class _Shares:
    """The indices of one process's share of every batch, without end."""

    def __init__(self, order: BatchOrder, start_step: int, process_index: int, num_processes: int) -> None:
        self.order = order
        self.start_step = start_step
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start_step):
            yield self.order.share(step, self.process_index, self.num_processes).tolist()


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process of a job. The parent saves and then ends its workers; if
    these went first, it would wait in vain in the middle of its step. So only the parent's own SIGTERM counts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_at_the_parents_word, daemon=True).start()


def _end_at_the_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def read_ahead(loader: DataLoader) -> Iterator[Any]:
    """What the loader yields. UserError, here and nowhere else, if a worker was killed, mostly for want of memory."""
    on_child = signal.getsignal(signal.SIGCHLD)
    # The workers are born with these blocked: libraries start threads in them before leave_signals_to_the_parent runs,
    # and one thread that takes SIGTERM is the end of its process.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise in the middle of whatever the caller does; without it the next read does.
        signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that reads the images was lost: {in_one_line(error)}") from error
