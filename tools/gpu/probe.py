"""What the machine is: GPU, versions, compilers, sanitizer. Prints it, and writes it as JSON to the file it is given.

Exit status 2 and one sentence where torch finds no GPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

NEEDED = ("setuptools", "cmake", "pybind11", "pytest", "hypothesis", "transformers", "accelerate")
OPTIONAL = ("ninja", "triton", "pytest-xdist", "pytest-timeout", "matplotlib", "tyro", "diffusers")
PROGRAMS = {  # each with what makes it say its version
    "nvcc": "--version", "c++": "--version", "cmake": "--version", "ninja": "--version", "ncu": "--version",
    "cuobjdump": "--version",
}  # fmt: skip
LIMIT = 10.0  # seconds for a program to say its version


def main(output: str, sanitizer: str) -> int:
    import torch

    if not torch.cuda.is_available():
        print("gpu_check needs a GPU and a CUDA build of torch, and torch finds none here", file=sys.stderr)
        return 2
    machine = describe(torch, sanitizer)
    Path(output).write_text(json.dumps(machine))
    for key, value in machine.items():
        if key != "sanitizer_help":
            print(f"{key}: {value}")
    return 0


def describe(torch, sanitizer: str) -> dict:
    gpu = torch.cuda.get_device_properties(0)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "gpu": gpu.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "l2_mib": round(getattr(gpu, "L2_cache_size", 0) / 2**20, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "python_header": "there" if header.exists() else "Python.h is missing: nothing can be built",
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "programs": {name: version(ask(name, flag)) for name, flag in PROGRAMS.items()},
        "packages": {name: installed(name) for name in (*NEEDED, *OPTIONAL)},
        "sanitizer": version(ask(sanitizer, "--version")),
        "sanitizer_help": ask(sanitizer, "--help") or "",
    }


def ask(*command: str) -> str | None:
    """What a program prints; None if there is no such program or it prints nothing in time."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (result.stdout or result.stderr).strip() if result.returncode == 0 else None


def version(words: str | None) -> str | None:
    """The first number with a point in it that comes after «release», «version» or nothing."""
    found = re.search(r"(?:release|[Vv]ersion)\s+v?(\d+(?:\.\d+)+)", words or "") or re.search(
        r"(\d+(?:\.\d+)+)", words or ""
    )
    return found.group(1) if found else None


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
