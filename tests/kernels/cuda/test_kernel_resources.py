"""No kernel spills, none takes more registers than recorded; and tools/kernel_resources, which sees to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
CANNOT_TELL = 77

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelIfLi4EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z6kernelIfLi4EEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 616 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6kernelIfLi4EEvPT_' for 'sm_120'
ptxas info    : Function properties for _Z6kernelIfLi4EEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
SPILLING = REPORT.replace("0 bytes spill stores, 0 bytes spill loads", "52 bytes spill stores, 36 bytes spill loads")
LOSS = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
OTHER_KERNEL = REPORT.replace("Li4E", "Li8E")
WARNING = 'kernel.cu(7): warning #177-D: variable "x" was declared but never referenced'


def test_no_kernel_spills_or_outgrows_its_record():
    result = subprocess.run([sys.executable, TOOLS / "kernel_resources", "check"], capture_output=True, text=True)
    if result.returncode == CANNOT_TELL:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr


class Tree:
    """A source tree with one kernel, the tool, and a compiler that prints the report it is given."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("tools", "csrc/kernels/cuda", "build/here", "tests/kernels/cuda"):
            (root / folder).mkdir(parents=True)
        for name in ("kernel_resources", "kernel_sources.py", "sass.py"):
            shutil.copy(TOOLS / name, root / "tools")
        self.source, self.object = root / "csrc/kernels/cuda/kernel.cu", root / "build/here/kernel.cu.o"
        self.source.write_text('#include "kernel.h"\n')
        self.source.with_name("kernel.h").write_text("// a header\n")
        (root / "setup.py").write_text("# builds nothing: what is there is all there is\n")

    def run(self, *arguments, nvcc=True):
        environment = {**os.environ, "CUDACXX": sys.executable if nvcc else "no-such-compiler"}
        environment.pop("HASTE_CUDA", None)
        command = [sys.executable, self.root / "tools/kernel_resources", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def compile(self, report, release="13.0", status=0):
        """By a compiler named nvcc that prints its release, or a warning and the report."""
        nvcc = self.root / "nvcc"
        nvcc.write_text(
            f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('release {release}, V1'); sys.exit()\n"
            f"print({WARNING + chr(10) + report!r}, file=sys.stderr)\nsys.exit({status})\n"
        )
        nvcc.chmod(0o755)
        return self.run("record", "", nvcc, "-c", self.source, "-o", self.object)

    def check(self, report, **kwargs):
        """The status and words of `check` once the kernel was compiled with this report."""
        self.compile(report, **kwargs)
        result = self.run("check", nvcc=False)
        assert result.stderr == ""
        return result.returncode, result.stdout


@pytest.fixture
def tree(tmp_path) -> Tree:
    """Its record holds REPORT."""
    tree = Tree(tmp_path)
    tree.compile(REPORT)
    assert tree.run("accept").returncode == 0
    return tree


def test_table_of_what_was_recorded(tree):
    result = tree.compile(SPILLING)
    assert result.returncode == 0
    assert result.stdout.strip() == WARNING, "warnings pass, the report does not"
    lines = tree.run("table", tree.object).stdout.splitlines()
    assert lines[0].split()[-2:] == ["sm_80", "sm_120"]
    assert lines[1].startswith("kernel: kernel<float, 4>")
    assert lines[1].split()[-2:] == ["96+88B", "128+88B"]
    assert lines[2] == "1 kernels, 2 targets, 2 of them spill"


def test_the_machine_code_for_9_0_is_kept_beside_the_object(tree):
    nvcc = tree.root / "nvcc"
    nvcc.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nfor word in sys.argv:\n  if word.startswith('--keep-dir='):\n"
        "    folder = pathlib.Path(word.removeprefix('--keep-dir='))\n"
        "    (folder / 'kernel.compute_80.cubin').write_text('80')\n"
        "    (folder / 'kernel.compute_90a.cubin').write_text('90a')\n"
    )
    kept = tree.object.with_name("kernel.cu.o.90.cubin")
    tree.run("record", "", nvcc, "-gencode=arch=compute_80,code=sm_80", "-c", tree.source, "-o", tree.object)
    assert not kept.exists()
    tree.run("record", "", nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-c", tree.source, "-o", tree.object)
    assert kept.read_text() == "90a" and not list(tree.object.parent.glob("*.kept"))


def test_a_failed_compilation_keeps_its_status_and_its_words(tree):
    tree.object.with_name("kernel.cu.o.resources").unlink()
    result = tree.compile(REPORT, status=2)
    assert result.returncode == 2
    assert WARNING in result.stdout
    assert not tree.object.with_name("kernel.cu.o.resources").exists()


def test_the_same_registers_or_fewer_pass(tree):
    assert tree.check(REPORT)[0] == 0
    assert tree.check(REPORT.replace("Used 96", "Used 80"))[0] == 0


@pytest.mark.parametrize(
    ("report", "sentence"),
    (
        (SPILLING, "kernel: kernel<float, 4> spills 88 bytes on sm_80"),
        (REPORT.replace("Used 96", "Used 97"), "takes 97 registers on sm_80; 96 are recorded"),
        (REPORT.replace("sm_120", "sm_90a"), "takes 128 registers on sm_90a and is not in the record"),
        (OTHER_KERNEL, "kernel: kernel<float, 8> takes 96 registers on sm_80 and is not in the record"),
        (OTHER_KERNEL, "kernel: kernel<float, 4> is recorded for sm_120 and was not compiled for it"),
    ),
)
def test_what_is_worse_than_the_record_fails(tree, report, sentence):
    tree.compile(report)
    result = tree.run("check")
    assert result.returncode == 1
    assert sentence in result.stdout and "tools/kernel_resources accept" in result.stdout


def test_serialised_wgmma_fails_and_is_not_hidden_while_compiling(tree):
    assert LOSS in tree.compile(REPORT + LOSS).stdout
    result = tree.run("check", nvcc=False)
    assert result.returncode == 1
    assert f"csrc/kernels/cuda/kernel.cu: {LOSS}" in result.stdout


def test_of_another_compiler_only_spills_are_judged(tree):
    more = REPORT.replace("Used 96", "Used 97")
    status, words = tree.check(more, release="14.1")
    assert status == 0 and "recorded for nvcc 13.0 and this is 14.1" in words
    assert tree.check(SPILLING, release="14.1")[0] == 1


def test_a_report_of_an_older_source_does_not_count(tree):
    """Neither when the source itself nor when a header of it has changed."""
    for path in (tree.source, tree.source.with_name("kernel.h")):
        assert tree.check(REPORT)[0] == 0
        path.write_text(path.read_text() + "// changed\n")
        result = tree.run("check", nvcc=False)
        assert result.returncode == CANNOT_TELL and "no nvcc" in result.stdout


def test_one_kernel_more_leaves_the_lines_of_the_others_as_they_are(tree):
    record = tree.root / "tests/kernels/cuda/kernel_registers.txt"
    before = record.read_text().splitlines()
    longer = REPORT.replace("_Z6kernelIfLi4EEvPT_", "_Z38another_kernel_with_quite_a_lot_to_sayIfLi4EEvPT_")
    tree.compile(REPORT + longer)
    assert tree.run("accept").returncode == 0
    assert set(before) < set(record.read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    (
        (["check", "/nope"], "RECORD must be a file that `tools/kernel_resources accept` wrote, got /nope"),
        (["check", __file__], f"RECORD must be a file that `tools/kernel_resources accept` wrote, got {__file__}"),
        (["accept", "/nope/r"], "RECORD must be a file in a folder that there is"),
        (["record", "/nope"], "COMMAND must be a compiler's, got /nope ..., which cannot be run (No such file"),
        (["record", "", "/"], "COMMAND must be a compiler's, got / ..., which cannot be run (Permission denied)"),
        (["table", "/nope"], "OBJECT must be compiled by `kernel_resources record`, got /nope"),
    ),
)
def test_what_cannot_be_used_is_refused_in_a_sentence(tree, arguments, sentence):
    result = tree.run(*arguments)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(sentence)


def test_a_table_says_which_objects_have_no_report(tree):
    lines = tree.run("table", tree.object, "/nope").stdout.splitlines()
    assert lines[2:] == ["no report lies beside /nope", "1 kernels, 2 targets, 0 of them spill"]
