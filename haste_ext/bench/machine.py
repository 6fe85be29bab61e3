"""Where a measurement was made: commit, versions, processor; and the roofline of that machine.

The roofline is measured in the same run: what nothing that moves and multiplies can beat by much.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import haste_ext
from haste_ext import _compat
from haste_ext.bench.measure import times_of
from haste_ext.bench.operations import Phase

HERE = Path(__file__).resolve()

SECONDS = 0.5
COPY_ELEMENTS = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # float32, far beyond the caches
MATMUL_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
SLOW = 0.2  # seconds of one product, after which no larger one is tried: some processors have no arithmetic for a type
EXP_ELEMENTS, EXPS_PER_ELEMENT = 64 * 2**20, 512

Roofline = Mapping[str, Any]


def describe_machine(device: str) -> dict[str, object]:
    build = haste_ext.build_info()
    return {
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "haste_ext": build["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": build["cpu_capability"],
        "gpu": gpu() if device == "cuda" else None,
        "build": build,
    }


def commit() -> dict[str, object]:
    """Of the source tree that this file is tracked in; unknown for an installed package."""
    if git("ls-files", "--error-unmatch", HERE.name) is None:
        return {"commit": None, "modified": None}
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, object]:
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}


def measure_roofline(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, object]:
    """The best of some repetitions each: copy bandwidth (bytes read + written), matmul rate by type, exponentials."""
    dtypes = dict.fromkeys((torch.float32, *dtypes))
    return {
        "copy_bytes_per_second": copy_rate(device),
        "matmul_flops_per_second": {str(dtype).removeprefix("torch."): matmul_rate(device, dtype) for dtype in dtypes},
        "exps_per_second": exp_rate() if device == "cuda" else None,  # on the CPU they are ordinary arithmetic
    }


def copy_rate(device: str) -> float:
    source = torch.ones(COPY_ELEMENTS[device], device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(times_of([lambda: target.copy_(source)], SECONDS, device))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Of square products, the best size."""
    best = 0.0
    for n in MATMUL_SIZES[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        seconds = min(times_of([product], SECONDS / 4, device))
        best = max(best, 2 * n**3 / seconds)
        if seconds > SLOW:
            break
    return best


def exp_rate() -> float | None:
    """exp2 of values in registers, many per element; None where torch cannot compile the kernel."""
    code = f"""
    template <typename T> T exp2_chain(T x) {{
      for (int i = 0; i < {EXPS_PER_ELEMENT}; ++i) x = exp2f(-x);
      return x;
    }}"""
    x = torch.zeros(EXP_ELEMENTS, device="cuda")
    try:
        chain = _compat.create_cuda_function(code)
        chain(x)
    except RuntimeError:
        return None
    return EXP_ELEMENTS * EXPS_PER_ELEMENT / min(times_of([lambda: chain(x)], SECONDS, "cuda"))


def floor_seconds(phases: Iterable[Phase], dtype: str, roofline: Roofline) -> float:
    """The least time: in every phase that of its slowest part, were all at the measured limits."""
    return sum(max(limits(phase, dtype, roofline).values()) for phase in phases)


def limits(phase: Phase, dtype: str, roofline: Roofline) -> dict[str, float]:
    """Seconds that each part of a phase takes at the least."""
    rates = roofline["matmul_flops_per_second"]
    rate = rates[dtype] if dtype == "float64" else max(rates[dtype], rates["float32"])  # half precision can be widened
    seconds = {
        "memory": phase.bytes / roofline["copy_bytes_per_second"],
        "matmul": phase.matmul_flops / rate,
    }
    if roofline["exps_per_second"]:
        seconds["exp"] = phase.exps / roofline["exps_per_second"]
    return seconds
