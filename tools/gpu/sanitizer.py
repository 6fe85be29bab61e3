"""compute-sanitizer: which one runs, with which options, and what its words mean.

Its findings are read from its log. One that benchmarks/gpu/judged_false_positives.md names counts as judged; hazards
that an old racecheck sees in kernels with mbarriers count as not judged; any other makes the stage fail.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ERROR = 9  # exit status where it found something
GOOD_RACECHECK = (2025, 4)  # before it, waits on mbarriers are not understood
WHEEL = "nvidia_cuda_sanitizer_api*.whl"
# Options that not every version has: (tool or "" for all, option, value).
OPTIONAL = (
    ("", "--show-backtrace", "device"),
    ("memcheck", "--check-warpgroup-mma", "yes"),
    ("memcheck", "--check-bulk-copy", "yes"),
    ("racecheck", "--racecheck-memcpy-async", "yes"),
    ("racecheck", "--racecheck-deadlock-timeout", "20000"),  # milliseconds
)
# Operations whose kernels have names of their own; the losses' are called alike.
KERNEL_OF = {"taylor_extrapolate": "extrapolate_kernel"}


def find(wheels: Path | None, scratch: Path) -> str:
    """The program: of a wheel in `wheels` if there is one, else the one on the PATH."""
    for wheel in sorted(wheels.glob(WHEEL) if wheels else ()):
        folder = scratch / "sanitizer"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        for program in sorted(path for path in folder.rglob("compute-sanitizer") if path.is_file()):
            for path in program.parent.iterdir():
                path.chmod(0o755)  # zipfile keeps no permissions
            return str(program)
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def command(program: str, tool: str, help_text: str, log: Path) -> list[str]:
    """What stands before the program that is to be watched."""
    words = [program, "--tool", tool, "--kernel-name", "kns=haste", "--error-exitcode", str(ERROR)]
    words += ["--print-limit", "20", "--log-file", str(log)]
    if tool == "memcheck":
        words += ["--report-api-errors", "no"]
    for only, option, value in OPTIONAL:
        if only in ("", tool) and re.search(rf"{option}\b", help_text):
            words += [option, value]
    return words


@dataclass(frozen=True)
class Judged:
    """A finding that is none: its tool, a pattern of its kernel and words, and the reason."""

    tool: str
    kernel: str
    words: str
    reason: str

    def explains(self, tool: str, finding: str) -> bool:
        return tool == self.tool and bool(re.search(self.kernel, finding) and re.search(self.words, finding))


ROW = re.compile(r"^\|\s*(\w+)\s*\|\s*`(.+?)`\s*\|\s*`(.+?)`\s*\|\s*(\S.*?)\s*\|$")


def judged_false_positives(page: Path) -> list[Judged]:
    """The rows of the page's table: tool, `kernel`, `words`, reason. ValueError for a row that is none."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")][2:]
    found = []
    for row in rows:
        match = ROW.match(row)
        if match is None or match[1] not in TOOLS:
            raise ValueError(f"rows of {page.name} must be | tool | `kernel` | `words` | reason |, got {row!r}")
        found.append(Judged(*match.groups()))
    return found


@dataclass
class Verdict:
    """whole: the sanitizer came to its summary. findings: what counts, by its first line. faulty: their operations."""

    whole: bool = False
    findings: list[str] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)
    judged: list[str] = field(default_factory=list)
    not_judged: list[str] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.findings or self.judged or self.not_judged)


def verdict(
    tool: str, version: str | None, log: str, operations: Sequence[str], mbarriers: bool, known: Iterable[Judged]
) -> Verdict:
    """Judge these operations by the log of one run. mbarriers: whether their kernels wait on mbarriers."""
    found = Verdict(whole="SUMMARY" in log)
    for finding in findings(log):
        first = finding.splitlines()[0]
        reason = next((entry.reason for entry in known if entry.explains(tool, finding)), None)
        if reason is not None:
            found.judged.append(f"{first}: {reason}")
        elif tool == "racecheck" and mbarriers and is_old(version) and re.search("race|hazard", first, re.IGNORECASE):
            found.not_judged.append(first)
        else:
            found.findings.append(first)
            found.faulty |= concerned(finding, operations)
    return found


def findings(log: str) -> list[str]:
    """Each with its details, which are indented; neither headings nor summaries."""
    blocks: list[list[str]] = []
    for line in log.splitlines():
        words = line.removeprefix("=========")
        if words == line or not words.strip():
            continue
        if words.startswith("  ") and blocks:
            blocks[-1].append(words.strip())
        elif not words.startswith("  "):
            blocks.append([words.strip()])
    heads = re.compile(r"COMPUTE-SANITIZER|.*SUMMARY|.*hazards? displayed|No CUDA-MEMCHECK results|Copyright|Version")
    return ["\n".join(block) for block in blocks if not heads.match(block[0])]


def concerned(finding: str, operations: Sequence[str]) -> set[str]:
    """Operations whose kernel the finding names; where none of a name of its own is, all that it may be."""
    named = {operation for operation in operations if KERNEL_OF.get(operation, "\0") in finding}
    if named or "_kernel" not in finding:
        return named or set(operations)
    return {operation for operation in operations if operation not in KERNEL_OF}


def is_old(version: str | None) -> bool:
    return tuple(int(part) for part in (version or "0").split(".")[:2]) < GOOD_RACECHECK
