"""Rows of a sweep with given numbers."""

from __future__ import annotations

from haste.generation.config import SamplingConfig
from haste.sweep.records import Row


def plain_row(steps: int, fd: float, psnr: float | None = None, **values) -> Row:
    """A full run of so many steps: a millisecond and a GFLOP each."""
    return make_row(SamplingConfig(num_steps=steps), 1e-3 * steps, fd, psnr, flops=1e9 * steps, **values)


def cached_row(interval: int, seconds: float, fd: float, psnr: float | None = None, **values) -> Row:
    """TaylorSeer with this interval in 50 steps."""
    full = 2 + 47 // interval
    settings = SamplingConfig(cache=values.pop("cache", "taylor"), granularity=values.pop("granularity", "module"),
                                interval=interval, order=values.pop("order", 1))  # fmt: skip
    return make_row(settings, seconds, fd, psnr, **{"flops": 1e9 * full, "full_calls": full, **values})


def make_row(settings: SamplingConfig, seconds: float, fd: float, psnr: float | None, **values) -> Row:
    defaults = {
        "speedup": 0.05 / seconds,
        "flops_speedup": 50e9 / values["flops"],
        "peak_bytes": 50 * 2**20,
        "cache_bytes": 0,
        "calls": settings.num_steps,
        "full_calls": settings.num_steps,
        "label_accuracy": None,
        "ssim": None if psnr is None else 0.9,
    }
    return Row(settings=settings, seconds=seconds, fd=fd, psnr=psnr, **{**defaults, **values})
