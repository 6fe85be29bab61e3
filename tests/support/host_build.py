"""Compiles C++ for tests: units side by side, linked, and kept until their sources change."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc/kernels"
Unit = tuple[Path, Sequence[object]]  # a source, and the flags that are its own


def host_compiler() -> list[str]:
    """The command of CXX, or g++; skips the test where there is none."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} to compile kernels for the host; CXX names another compiler")
    return compiler


def build(
    folder: Path, units: Sequence[Unit], flags: Sequence[str], link: Sequence[str], files: Iterable[Path]
) -> Path:
    """What the units make in `folder`, compiled unless it is there for this very state of `files`.

    Of several test processes one compiles and the others wait; a compile error fails with the compiler's words.
    """
    compiler = host_compiler()
    state = hashlib.sha256(" ".join(map(str, [*compiler, *flags, *link, *units])).encode())
    for path in sorted(files):
        state.update(path.name.encode() + path.read_bytes())
    built = folder / state.hexdigest()[:16]
    with one_at_a_time(folder):
        if not built.exists():
            with tempfile.TemporaryDirectory() as work:
                made = compile_and_link(compiler, units, flags, link, Path(work))
                for outdated in folder.glob("[!.]*"):
                    outdated.unlink()
                partial = built.with_suffix(f".{os.getpid()}")
                shutil.move(made, partial)
                partial.rename(built)  # at once, whole: a kill leaves none
    return built


def compile_and_link(compiler, units, flags, link, folder: Path) -> Path:
    def run(*command) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.fail(f"{' '.join(map(str, command))}\n{result.stderr}", pytrace=False)

    objects = [folder / f"{i}.o" for i in range(len(units))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(run, *compiler, *flags, *own, "-x", "c++", "-c", source, "-o", target)
            for (source, own), target in zip(units, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    made = folder / "made"
    run(*compiler, *link, *objects, "-o", made)
    return made


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """While this context is open no other process is in it for the same folder."""
    with open(folder / ".compiling", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
