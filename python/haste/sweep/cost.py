"""What drawing costs: seconds, floating-point operations, memory. The model and the sampler alone, no files."""

from __future__ import annotations

import gc
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from haste.generation.drawing import Sampler
from haste_ext.bench.measure import peak_extra_bytes

FLOP_PICTURES = 2


def count_cost(sampler: Sampler, batch: int) -> dict[str, Any]:
    """What does not depend on the machine's mood, of a run of `batch` pictures.

    flops: per picture, as torch.utils.flop_counter counts them in a real run: two per multiply-add of every matrix
    product and convolution, attention's included. Elementwise work and the operations of haste_ext count nothing.
    peak_bytes: the highest memory during a run beyond what was held before it, weights for example; None if unknown.
    cache_bytes: what the snapshots hold at the end of the run. calls, full_calls: evaluations of the model.
    full_steps: their numbers; None without a cache.
    """
    start = sampler.start_of(range(batch))
    sampler.warm_up(batch)
    if sampler.cache is not None:
        sampler.cache.release()  # its memory is part of the peak
    peak = peak_extra_bytes(lambda: (sampler.run(start),), start.noise.device.type, calls=1)
    calls, full = sampler.calls
    cache = sampler.cache
    return {
        "flops": count_flops(sampler),
        "peak_bytes": peak,
        "cache_bytes": 0 if cache is None else cache.cache_bytes,
        "calls": calls,
        "full_calls": full,
        "full_steps": None if cache is None else cache.full_steps,
    }


def flop_counter() -> FlopCounterMode:
    """torch's counter, and in its list the attention that torch runs on the CPU, which it lacks."""

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: attention})


def count_flops(sampler: Sampler) -> float:
    """Per picture. Without CUDA graphs, as what a graph replays is not counted."""
    counted = sampler.with_settings(sampler.settings)
    with flop_counter() as counter:
        counted.run(counted.start_of(range(FLOP_PICTURES)))
    return counter.get_total_flops() / FLOP_PICTURES


def time_run(sampler: Sampler, batch: int) -> float:
    """Seconds per picture of one run of `batch` pictures, after what a first call sets up: on a GPU, a whole run."""
    start = sampler.start_of(range(batch))
    on_gpu = start.noise.is_cuda
    if on_gpu:
        sampler.run(start)
        torch.cuda.synchronize()
    else:
        sampler.warm_up(batch)
    collecting = gc.isenabled()
    gc.disable()  # a collection takes as long as many steps, and would hit some runs and not others
    try:
        begin = perf_counter()
        sampler.run(start)
        if on_gpu:
            torch.cuda.synchronize()
        return (perf_counter() - begin) / batch
    finally:
        if collecting:
            gc.enable()
