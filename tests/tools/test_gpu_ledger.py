"""tools/gpu_ledger: what the pages say about a GPU is what the ledger holds, for the sources as they now stand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PAGE = "# Page\n\n<!-- written by tools/gpu_ledger -->\n\n\n<!-- end -->\nEnd\n"


def test_the_pages_say_what_the_ledger_holds():
    result = subprocess.run([sys.executable, TOOLS / "gpu_ledger", "check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two kernels that share a header, a page for the table and one for the sentence."""
    for folder in ("tools", "haste_ext", "csrc/kernels/cuda/hopper", "benchmarks/gpu"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("gpu_ledger", "kernel_sources.py"):
        shutil.copy(TOOLS / name, tmp_path / "tools")
    kernels = tmp_path / "csrc/kernels/cuda"
    (kernels / "first.cu").write_text('#include <cuda.h>\n#include "shared.cuh"\n')
    (kernels / "hopper/second.cu").write_text('#include "kernels/cuda/shared.cuh"\n')
    (kernels / "shared.cuh").write_text('#pragma once\n#include "deep.h"\n')
    (kernels / "deep.h").write_text("// included by the header\n")
    (tmp_path / "haste_ext/README.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("No kernel of this repository\nhas run on a GPU yet.\n")
    return tmp_path


def ledger(tree, *arguments):
    command = [sys.executable, tree / "tools/gpu_ledger", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def add_run(tree, *sources, **more):
    """A run that verified these sources as they now stand."""
    code = f"import json, kernel_sources as k; print(json.dumps({{s: k.source_hash(s) for s in {sources!r}}}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=tree / "tools", capture_output=True, text=True, check=True)
    run = tree / "benchmarks/gpu/2026-01-31-h200"
    run.mkdir()
    machine = {"gpu": "NVIDIA H200", "sanitizer": "2025.3.1.0", "switches": {}, "verified": json.loads(out.stdout)}
    (run / "machine.json").write_text(json.dumps(machine | more))


def rows(tree):
    """Source → what the table says of it."""
    lines = ledger(tree).stdout.splitlines()[2:]
    return {line.split("|")[1].strip().strip("`"): line.split("|")[2].strip() for line in lines}


def test_nothing_is_verified_where_nothing_has_run(tree):
    assert rows(tree) == {"first.cu": "not yet", "hopper/second.cu": "not yet"}
    assert ledger(tree, "check").returncode == 1, "the page has no table yet"
    assert ledger(tree, "write").stdout == "No kernel of this repository has run on a GPU yet.\n"
    assert ledger(tree, "check").returncode == 0
    page = (tree / "haste_ext/README.md").read_text()
    assert page.startswith("# Page\n") and page.endswith("<!-- end -->\nEnd\n") and "| `first.cu` | not yet |" in page


def test_a_run_verifies_its_sources_and_both_pages_must_say_so(tree):
    ledger(tree, "write")
    add_run(tree, "csrc/kernels/cuda/first.cu")
    found = rows(tree)
    link = "([2026-01-31-h200](../benchmarks/gpu/2026-01-31-h200/summary.md))"
    assert f"NVIDIA H200, compute-sanitizer 2025.3.1.0 {link}" in found["first.cu"]
    assert found["hopper/second.cu"] == "not yet"
    stale = ledger(tree, "check")
    assert stale.returncode == 1
    assert "haste_ext/README.md is out of date" in stale.stdout
    assert "README.md must say: Of the 2 kernel sources, 1 are verified on a GPU" in stale.stdout


@pytest.mark.parametrize("changed", ("first.cu", "shared.cuh", "deep.h"))
def test_a_change_to_a_source_or_its_headers_makes_it_unverified(tree, changed):
    add_run(tree, "csrc/kernels/cuda/first.cu")
    path = tree / "csrc/kernels/cuda" / changed
    path.write_text(path.read_text() + "// changed\n")
    assert rows(tree)["first.cu"] == "not yet"


def test_a_change_elsewhere_leaves_it_verified(tree):
    add_run(tree, "csrc/kernels/cuda/first.cu")
    (tree / "csrc/kernels/cuda/hopper/second.cu").write_text("// changed\n")
    assert "NVIDIA H200" in rows(tree)["first.cu"]


def test_what_was_switched_on_stands_beside_the_kernels_that_it_is_for(tree):
    add_run(tree, "csrc/kernels/cuda/first.cu", "csrc/kernels/cuda/hopper/second.cu", switches={"HASTE_OTHER": "1"})
    found = rows(tree)
    assert "HASTE_OTHER=1" in found["hopper/second.cu"] and "HASTE_OTHER" not in found["first.cu"]


def test_a_rehearsal_is_no_run(tree):
    add_run(tree, "csrc/kernels/cuda/first.cu", rehearsal=True)
    result = ledger(tree, "check")
    assert result.returncode == 1 and "machine.json is of a rehearsal, which ran on no GPU" in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    (
        ('{"gpu": "NVIDIA H2', "got no JSON"),
        ("[]", "got a file without gpu, sanitizer, switches, verified"),
        ('{"gpu": "NVIDIA H200", "sanitizer": null, "switches": {}}', "got a file without verified"),
        ('{"gpu": "NVIDIA H200", "switches": {}, "verified": []}', "got a file without sanitizer, verified"),
    ),
)
def test_a_run_that_is_not_whole_is_named(tree, words, sentence):
    add_run(tree)
    (tree / "benchmarks/gpu/2026-01-31-h200/machine.json").write_text(words)
    for arguments in ([], ["check"], ["write"]):
        result = ledger(tree, *arguments)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("benchmarks/gpu/2026-01-31-h200/machine.json must be ")
        assert sentence in result.stderr
    assert (tree / "haste_ext/README.md").read_text() == PAGE


@pytest.mark.parametrize("flag", ("-h", "--help"))
@pytest.mark.parametrize("tool", ("gpu_ledger", "kernel_counts", "kernel_resources"))
def test_help_is_printed_to_whoever_asks_for_it(tool, flag):
    result = subprocess.run([sys.executable, TOOLS / tool, flag], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and tool in result.stdout
    wrong = subprocess.run([sys.executable, TOOLS / tool, "--nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr == result.stdout
