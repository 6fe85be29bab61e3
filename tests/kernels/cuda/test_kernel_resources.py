"""tools/kernel_resources: from the compiler's report to one table, without a compiler for GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools/kernel_resources"

REPORT = """\
kernel.cu(7): warning #177-D: variable "x" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelIfLi4EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z6kernelIfLi4EEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 616 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6kernelIfLi4EEvPT_' for 'sm_120'
ptxas info    : Function properties for _Z6kernelIfLi4EEvPT_
    24 bytes stack frame, 52 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, **kwargs)


def record(folder, status=0):
    """A compiler that prints the report and ends with `status`."""
    compiler = folder / "compiler.py"
    compiler.write_text(f"import sys\nprint({REPORT!r}, file=sys.stderr)\nsys.exit({status})\n")
    return run("record", "", sys.executable, compiler, "-c", "kernel.cu", "-o", folder / "kernel.cu.o")


def test_table_of_what_was_recorded(tmp_path):
    result = record(tmp_path)
    assert result.returncode == 0
    assert result.stdout.strip() == REPORT.splitlines()[0], "warnings pass, the report does not"
    lines = run("table", tmp_path / "kernel.cu.o").stdout.splitlines()
    assert lines[0].split()[-2:] == ["sm_80", "sm_120"]
    assert lines[1].startswith("kernel: ") and "kernel" in lines[1]
    assert lines[1].split()[-2:] == ["96", "128+88B"]
    assert lines[2] == "1 kernels, 2 targets, 1 of them spill"


def test_a_failed_compilation_keeps_its_status_and_its_words(tmp_path):
    result = record(tmp_path, status=2)
    assert result.returncode == 2
    assert REPORT.splitlines()[0] in result.stdout
    assert not (tmp_path / "kernel.cu.o.resources").exists()
