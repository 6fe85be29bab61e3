"""Where a measurement was made: the commit, the versions, the processor."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import haste_ext

HERE = Path(__file__).resolve()


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
        "cpu_path": build["cpu_path"],
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
