"""The stages' own programs, as far as a CPU can run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernel_times
import probe
import pytest
import smoke
import torch
from gpu import entry, records
from gpu.runner import Run
from problems import GROUPS, problems

import haste_ext
from haste_ext.bench.operations import AttentionCase

ROOT = Path(__file__).parents[2]


def run_smoke(tmp_path, *flags) -> tuple[subprocess.CompletedProcess, records.Tally]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", records.FILE: str(tmp_path / "out.jsonl"), records.STAGE: "s"}
    command = [sys.executable, str(ROOT / "tools/gpu/smoke.py"), "cpu", *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result, records.tally(tmp_path / "out.jsonl", "s")


def test_every_problem_is_named_run_and_right(tmp_path):
    result, tally = run_smoke(tmp_path, "--groups", "shared", "portable")
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(tally.results.values()) == {"passed"} and not tally.lost and len(tally.results) > 60
    assert all(f"{name} ... ok" in result.stdout for name in tally.results)


def test_what_a_sanitizer_watches_runs_too(tmp_path):
    result, tally = run_smoke(tmp_path, "--sanitized", "--groups", *GROUPS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 50 < len(tally.results) < 200 and not tally.lost


@pytest.mark.parametrize("sanitized", (False, True))
def test_problems_cover_all_operations_smallest_first(sanitized):
    chosen = {group: problems(group, sanitized) for group in GROUPS}
    operations = {problem.operation for own in chosen.values() for problem in own}
    assert operations == {name for name in haste_ext.__all__ if name != "build_info"}
    for group, own in chosen.items():
        assert [p.size for p in own] == sorted(p.size for p in own)
        assert len({p.name for p in own}) == len(own), "a name is one problem's"
        if group != "shared":
            settings = [p.settings for p in own]
            assert {s.get("divergence") for s in settings} == {None, "kl", "cross_entropy"}
            assert {bool(s.get("causal")) for s in settings} == {False, True}


def test_what_is_wrong_or_changes_from_run_to_run_is_seen(monkeypatch):
    problem = problems("shared")[5]
    right = getattr(haste_ext, problem.operation)
    assert smoke.check(problem, "cpu")[0] == ""
    monkeypatch.setattr(haste_ext, problem.operation, lambda *x, **k: right(*x, **k) * 1.3)
    assert "value is off by" in smoke.check(problem, "cpu")[0]
    monkeypatch.setattr(haste_ext, problem.operation, lambda *x, **k: right(*x, **k) * float("nan"))
    assert "value is off by nan" in smoke.check(problem, "cpu")[0]
    factors = iter((1.0, 1.0 + 1e-2, 1.0, 1.0))
    monkeypatch.setattr(haste_ext, problem.operation, lambda *x, **k: right(*x, **k) * next(factors))
    assert "differs from run to run" in smoke.check(problem, "cpu")[0]


def test_an_error_is_recorded_and_the_next_problem_runs(tmp_path, monkeypatch, capsys):
    def refuses(*operands, **settings):
        raise ValueError("no such kernel")

    monkeypatch.setenv(records.FILE, str(tmp_path / "out.jsonl"))
    problem = problems("shared")[0]
    monkeypatch.setattr(haste_ext, problem.operation, refuses)
    assert not smoke.attempt(problem, "cpu", checked=True)
    assert "WRONG: ValueError: no such kernel" in capsys.readouterr().out
    assert records.tally(tmp_path / "out.jsonl", "").results == {problem.name: "failed"}


def test_each_kernel_is_called_as_the_operation_takes_it():
    inputs = kernel_times.Inputs(AttentionCase(2, 9, torch.float32, "cpu", 2, 8, 16))
    results = {name: kernel(inputs) for name, kernel in kernel_times.KERNELS.items()}
    dq, dk = results["backward"]
    assert dq.shape == inputs.operands[0].shape and torch.equal(dq, results["backward, grad_out per row"][0])
    assert torch.equal(dq, results["dq alone"][0]) and torch.equal(dk, results["dk alone"][1])
    assert results["dq alone"][1].numel() == results["dk alone"][0].numel() == 0
    row = {"tokens": 256, "kernel": "forward", "seconds": 2e-4, "host_seconds": 5e-5, "floor_seconds": 1e-4}
    words = kernel_times.line({**row, "timed_by_events": "it waits"})
    assert "200.0 µs   50% of the floor, 100.0 µs;  host 50 µs  by events: it waits" in words


def test_the_kernels_times_end_in_a_table_of_the_summary(tmp_path, monkeypatch, capsys):
    """With a stand-in for the timer, which calls every kernel on all of its inputs."""

    class Timer:
        why_events = None

        def __init__(self, calls):
            assert len(calls) > 1 and all(isinstance(call(), (tuple, torch.Tensor)) for call in calls)

        def times(self, min_seconds):
            return [2e-4] * 3

        def host_times(self):
            return [5e-5] * 3

    rates = {"copy_bytes_per_second": 1e12, "matmul_flops_per_second": {"bfloat16": 1e14, "float32": 1e13}}
    output = tmp_path / "kernel_times_hopper.json"
    monkeypatch.setattr(kernel_times, "GpuTimer", Timer)
    monkeypatch.setattr(kernel_times, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_times, "TOKENS", 64)
    monkeypatch.setattr(kernel_times, "rotations", lambda case: 2)
    monkeypatch.setattr(kernel_times, "measure_roofline", lambda *_: {**rates, "exps_per_second": 1e12})
    monkeypatch.setattr(sys, "argv", ["kernel_times.py", "--tokens", "16", "32", "--output", str(output)])
    assert kernel_times.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["tokens"], row["batch"]) for row in rows] == [(16, 4)] * 6 + [(32, 2)] * 6
    assert "copy 1.00 TB/s" in capsys.readouterr().out
    run = Run(tmp_path, tmp_path, "none", 0.0)
    entry.keep(run)
    share = f"{rows[0]['floor_seconds'] / 2e-4:.0%}"
    assert f"| 16 | 4 | forward | 200.0 | {share} | 50 |" in (tmp_path / "summary.md").read_text()
    assert "| 32 | 2 | dk alone | 200.0 |  | 50 |" in (tmp_path / "summary.md").read_text()


def test_the_probe_tells_what_a_gpu_is():
    gpu = SimpleNamespace(
        name="NVIDIA Test", major=9, minor=0, multi_processor_count=132, total_memory=2**37, L2_cache_size=60 * 2**20
    )
    cuda = SimpleNamespace(get_device_properties=lambda _: gpu, device_count=lambda: 1)
    fake = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"), __version__="2.11.0")
    machine = json.loads(json.dumps(probe.describe(fake, "no-such-sanitizer")))
    assert (machine["capability"], machine["memory_gib"], machine["l2_mib"]) == ("9.0", 128.0, 60.0)
    assert machine["packages"]["pytest"] and machine["sanitizer"] is None and machine["sanitizer_help"] == ""


@pytest.mark.parametrize(
    ("words", "version"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.1", "13.0"),
        ("NVIDIA (R) Compute Sanitizer\nCopyright (c) 2020-2025 NVIDIA\nVersion 2025.4.1.0 (build 3)", "2025.4.1.0"),
        ("c++ (Debian 12.2.0-14) 12.2.0", "12.2.0"),
        ("1.13.0.git", "1.13.0"),
        (None, None),
    ],
)
def test_versions_are_read(words, version):
    assert probe.version(words) == version
    assert probe.ask("no-such-program", "--version") is None and probe.installed("no-such-package") is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_n72_program_compiles(tmp_path):
    command = "nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc -cubin tools/gpu/wgmma_n72.cu -o"
    result = subprocess.run([*command.split(), str(tmp_path / "n72")], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
