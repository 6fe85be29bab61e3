"""The CUDA kernels' source files, and a hash of each with the headers that it includes.

A kernel's registers and what was seen of it on a GPU hold for one state of its source: this hash names that state.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "csrc/kernels/cuda"
ELEMENTS = re.compile(r"^// Compiled once per HASTE_ELEMENT: (.+)$", re.MULTILINE)
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def kernel_sources(root: Path = ROOT) -> list[str]:
    """Every .cu file, relative to the root of the tree."""
    return sorted(path.relative_to(root).as_posix() for path in (root / KERNELS).rglob("*.cu"))


def element_types(source: str | Path, root: Path = ROOT) -> list[str]:
    """What HASTE_ELEMENT is in the units that CMake makes of a source; none: it is compiled once, as it is."""
    found = ELEMENTS.search((root / source).read_text())
    return found[1].split() if found else []


def source_of_unit(unit: Path) -> Path:
    """The kernel source that a generated unit (`#define`s, one `#include`) compiles; the file itself if it is none."""
    found = [Path(name) for name in INCLUDE.findall(unit.read_text(errors="replace")) if name.endswith(".cu")]
    return found[0] if found else unit


def included_files(source: Path, root: Path = ROOT) -> list[Path]:
    """The source and all of its own headers; those of the toolkit, in <>, are the compiler's matter."""
    found, waiting = set(), [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in INCLUDE.findall(path.read_text(errors="replace")):
            candidates = [folder / name for folder in (path.parent, root / "csrc")]
            waiting += [candidate.resolve() for candidate in candidates if candidate.exists()][:1]
    return sorted(found)


def source_hash(source: str | Path, root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of the source and its headers."""
    state = hashlib.sha256()
    for path in included_files(root / source, root):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        content = path.read_bytes()
        state.update(f"{name} {len(content)}\n".encode() + content)
    return state.hexdigest()


def compiler_release(nvcc: str | None) -> str:
    """As nvcc prints it, "13.0"; "unknown" where it prints none or there is none."""
    said = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout if nvcc else ""
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else "unknown"


def refuse(sentence: str) -> NoReturn:
    """Ends the program as argparse would: of the words on its command line, one cannot be used."""
    print(sentence, file=sys.stderr)
    sys.exit(2)


def check_record(path: Path, tool: str) -> None:
    """Refuses, before anything is built or counted, a RECORD that `tool` could not write."""
    if path.is_dir() or not path.parent.is_dir():
        refuse(f"RECORD must be a file in a folder that there is, for tools/{tool} to write, got {path}")
