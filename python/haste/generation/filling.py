"""The drawing of what a sample folder lacks, batch by batch, by one process or several."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import groupby
from time import perf_counter

from haste.caching import check_memory
from haste.caching.schedule import describe_steps
from haste.generation.drawing import Sampler
from haste.generation.processes import Processes
from haste.generation.sample_folder import SampleFolder
from haste.progress import progress_bar

logger = logging.getLogger(__name__)

CALIBRATION_PICTURES = 8


def fill(sampler: Sampler, folder: SampleFolder, count: int, batch_size: int, processes: Processes) -> int:
    """Draw the pictures below `count` that the folder lacks, under a progress bar; how many those were.

    The processes draw in rounds, a batch each, and the first one keeps the record. So whatever ends them, all pictures
    that were drawn are there, and counted up to the last round.
    """
    missing = processes.agree(lambda: folder.missing(count))
    batches = deal(missing, min(batch_size, math.ceil(count / processes.count)))
    if batches:
        largest = max(map(len, batches))
        check_memory(sampler.student.model, sampler.settings, largest, guided=sampler.rows == 2)
        sampler.warm_up(largest)
    with progress_bar(
        total=count, initial=count - len(missing), unit="image", desc="sample", disable=not processes.first
    ) as bar:
        for start in range(0, len(batches), processes.count):
            together = batches[start : start + processes.count]
            own = together[processes.rank] if processes.rank < len(together) else []
            pictures = sum(map(len, together))
            done = bar.n + pictures
            seconds = 0.0
            if own:
                begin = perf_counter()
                images, _ = sampler.draw(own, advance(bar, pictures))
                seconds = perf_counter() - begin
                folder.write(own, images)
            slowest = max(processes.gather(seconds))
            if processes.first:
                folder.count(pictures, slowest, *sampler.calls)
                bar.update(done - bar.n)
    return len(missing)


def deal(missing: list[int], size: int) -> list[list[int]]:
    """Batches of at most `size` numbers, of which one holds the numbers from k·size to (k + 1)·size that are missing.

    So a picture shares its batch with the same others whichever process draws it, and after a resumption too: its
    matrix products are rounded alike.
    """
    return [list(batch) for _, batch in groupby(missing, key=lambda index: index // size)]


def advance(bar, pictures: int) -> Callable[[int, int], None]:
    """Moves the bar by whole pictures while the steps of one round go by."""
    base = bar.n

    def progress(step: int, steps: int) -> None:
        bar.update(base + pictures * step // steps - bar.n)

    return progress


def settle_full_steps(sampler: Sampler, folder: SampleFolder, processes: Processes) -> Sampler:
    """For --max-error: a sampler whose full steps are the same for all pictures of the command.

    Which they are is measured once, and always on the same pictures of the seed, however many are asked for; a folder
    that was begun keeps them. Otherwise a picture would depend on those that share its batch or its command.
    """
    if not sampler.settings.max_error:
        return sampler
    if folder.full_steps is None:
        folder.full_steps = processes.agree(lambda: measure_full_steps(sampler))
    steps = folder.full_steps
    error, total = sampler.settings.max_error, sampler.settings.num_steps
    logger.info("--max-error %g: %d of %d steps are full, %s", error, len(steps), total, describe_steps(steps))
    return sampler.with_full_steps(steps)


def measure_full_steps(sampler: Sampler) -> list[int]:
    """The full steps that an adaptive schedule finds: a function of the weights, the settings and the seed alone."""
    sampler.draw(range(CALIBRATION_PICTURES))
    steps = sampler.cache.full_steps
    sampler.cache.release()
    return steps
