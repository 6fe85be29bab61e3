"""tools/gpu_check without a GPU: its stages name what is there, and whatever a stage does its folder is whole."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MACHINE = {"gpu": "NVIDIA Test", "capability": "9.0", "date": "2026-01-31", "sources": {}}
AT_WORK = "import os; print(os.environ['HASTE_CUDA_PATH'], 'for', os.environ['TORCH_CUDA_ARCH_LIST'])"
# What pytest's --junitxml writes, shortened.
JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" tests="5">
<testcase classname="tests.haste_ext.test_attn_align_loss" name="test_opcheck[cuda]" time="0.1" />
<testcase classname="tests.haste_ext.test_small_shapes" name="test_any_layout[cuda-attn_align_loss-one]" time="0.1">
<failure message="AssertionError">words</failure></testcase>
<testcase classname="tests.haste_ext.test_token_cosine_loss" name="test_opcheck[cuda]" time="0.1" />
<testcase classname="tests.haste_ext.test_cuda_streams" name="test_second[token_cosine_loss]" time="0.1">
<skipped type="pytest.skip" message="needs two GPUs">here</skipped></testcase>
<testcase classname="tests.haste_ext.test_small_shapes" name="test_types[cuda-taylor_extrapolate_blocks]" time="0.1" />
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        loader = importlib.machinery.SourceFileLoader("gpu_check", str(ROOT / "tools/gpu_check"))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
        sys.modules["gpu_check"] = module  # dataclasses look their module up
        loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "tools"))
        sys.modules.pop("gpu_check", None)


def python(code):
    return [sys.executable, "-c", code]


def test_the_stages_name_what_is_there(gpu_check):
    result = subprocess.run([sys.executable, ROOT / "tools/gpu_check", "--dry-run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stages = gpu_check.stages_after_build(Path("folder"), Path("scratch"), gpu_check.PATHS)
    assert len(result.stdout.splitlines()) == 1 + len(stages)
    for stage in stages:
        tests = [word for word in stage.command if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in tests)
        assert tests or "haste_ext.bench" in stage.command
    logs = {stage.log for stage in stages} | {"build.log", "machine.json", "summary.md"}
    written = {Path(word).name for stage in stages for word in stage.command if word.startswith("folder/")}
    assert len(logs | written) <= 8, "what is brought back from a borrowed machine is few files"


def test_whole_training_steps_are_a_run_of_their_own(gpu_check):
    tool = [sys.executable, ROOT / "tools/gpu_check", "--dry-run", "--training"]
    build, train_step = subprocess.run(tool, capture_output=True, text=True, check=True).stdout.splitlines()
    assert build.startswith("build") and "benchmarks/train_step/run.py --device cuda" in train_step
    (stage,) = gpu_check.training_stages(Path("folder"))
    assert (ROOT / stage.command[1]).is_file()


def test_whole_sampling_runs_are_a_run_of_their_own(gpu_check):
    tool = [sys.executable, ROOT / "tools/gpu_check", "--dry-run", "--sampling"]
    build, tests, *batches = subprocess.run(tool, capture_output=True, text=True, check=True).stdout.splitlines()
    assert build.startswith("build") and "pytest" in tests and "tests/haste/caching" in tests
    assert [line.split(" --batch-size ")[1].split()[0] for line in batches] == ["1", "8", "64"]
    stages = gpu_check.sampling_stages(Path("folder"))
    named = [word for stage in stages for word in stage.command if word.startswith(("tests/", "benchmarks/"))]
    assert len(named) == len(stages) and all((ROOT / path).exists() for path in named)
    results = ("results.json", "results.md", "results.png")
    assert len({stage.log for stage in stages} | {"build.log", "machine.json", "summary.md", *results}) <= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the benchmark would run")
def test_sampling_runs_take_the_flags_that_they_are_given(gpu_check):
    """The script reads its whole command line before it says that there is no GPU."""
    stage = gpu_check.sampling_stages(Path("folder"))[-1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    result = subprocess.run(stage.command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "--device is cuda, and torch finds no CUDA device here" in result.stderr


def test_only_one_kind_of_run_at_a_time():
    tool = [sys.executable, ROOT / "tools/gpu_check", "--dry-run", "--sampling", "--training"]
    result = subprocess.run(tool, capture_output=True, text=True)
    assert result.returncode == 2 and "not allowed with argument" in result.stderr


def test_a_kernel_that_passes_everything_is_verified(gpu_check):
    good = gpu_check.Outcome("passed", 1.0, gpu_check.count_tests(JUNIT))
    stages = [f"{kind} {path}" for kind in ("correctness", "memcheck", "racecheck") for path in gpu_check.PATHS]
    verified = gpu_check.verified_sources(dict.fromkeys(stages, good))
    names = {Path(source).name for source in verified}
    assert {"token_cosine_loss.cu", "taylor_extrapolate.cu"} <= names, "what fails elsewhere does not matter to them"
    assert not [name for name in names if "attn_align_loss" in name], "a test of it failed"
    assert "device.cu" not in names, "it serves them all"
    assert verified["csrc/kernels/cuda/token_cosine_loss.cu"] == gpu_check.source_hash(
        "csrc/kernels/cuda/token_cosine_loss.cu"
    )


@pytest.mark.parametrize("stage", ("correctness portable", "memcheck portable", "racecheck portable"))
def test_a_stage_that_is_missing_or_did_not_end_verifies_nothing(gpu_check, stage):
    good = gpu_check.Outcome("passed", 1.0, gpu_check.count_tests(JUNIT))
    outcomes = dict.fromkeys(("correctness portable", "memcheck portable", "racecheck portable"), good)
    assert gpu_check.verified_sources(outcomes)
    for bad in (None, gpu_check.Outcome("out of time", 60.0, None), gpu_check.Outcome("passed", 1.0, {})):
        assert not gpu_check.verified_sources({**outcomes, stage: bad})


def test_errors_of_a_sanitizer_count_though_every_test_passed(gpu_check):
    tests = {name: {"passed": 3, "failed": 0, "skipped": 0} for name in gpu_check.OPERATIONS}
    stages = ("correctness portable", "memcheck portable", "racecheck portable")
    outcomes = dict.fromkeys(stages, gpu_check.Outcome("passed", 1.0, tests))
    names = {Path(source).name for source in gpu_check.verified_sources(outcomes)}
    assert {"token_cosine_loss.cu", "attn_align_loss_forward.cu"} <= names
    assert "device.cu" not in names, "it serves the path for Hopper too, which did not run"
    assert not gpu_check.verified_sources({**outcomes, "racecheck portable": gpu_check.Outcome("failed", 1.0, tests)})


def test_every_stage_runs_whatever_the_others_do(gpu_check, monkeypatch, tmp_path, capsys):
    """One passes, one fails, one is too slow, one cannot start, one runs tests; the folder tells of them all."""
    folder, junit = tmp_path / "run", tmp_path / "tests.xml"
    folder.mkdir()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    stages = [
        gpu_check.Stage("passes", "one.log", 20, python(AT_WORK), {"HASTE_CUDA_PATH": "portable"}),
        gpu_check.Stage("fails", "one.log", 20, python(f"raise SystemExit('lost in {ROOT}')")),
        gpu_check.Stage("sleeps", "two.log", 1, python("import time; print('tired'); time.sleep(60)")),
        gpu_check.Stage("is absent", "two.log", 20, ["no-such-program"]),
        gpu_check.Stage("tests", "two.log", 20, python(f"open({str(junit)!r}, 'w').write({JUNIT!r})"), {}, junit),
    ]
    monkeypatch.setattr(gpu_check, "build_stage", lambda: gpu_check.Stage("build", "b.log", 20, python("")))
    monkeypatch.setattr(gpu_check, "ask_python", lambda code: {"cuda_paths": ["portable", "hopper"]})
    monkeypatch.setattr(gpu_check, "stages_after_build", lambda folder, scratch, paths: stages)
    assert not gpu_check.run_all(folder, dict(MACHINE))
    document = json.loads((folder / "machine.json").read_text())
    assert {name: stage["status"] for name, stage in document["stages"].items()} == {
        "build": "passed",
        "passes": "passed",
        "fails": "failed",
        "sleeps": "out of time",
        "is absent": "failed",
        "tests": "passed",
    }
    assert document["stages"]["tests"]["tests"]["attn_align_loss"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert document["verified"] == {} and document["build_info"]["cuda_paths"] == ["portable", "hopper"]
    one, two = (folder / "one.log").read_text(), (folder / "two.log").read_text()
    assert "$ HASTE_CUDA_PATH=portable" in one and "portable for 9.0" in one and "tired" in two
    assert "lost in ." in one and str(ROOT) not in one, "no path of the machine is kept"
    assert "| sleeps | out of time |" in (folder / "summary.md").read_text()
    assert "sleeps: out of time" in capsys.readouterr().out


def test_nothing_is_started_once_the_time_is_up(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setattr(gpu_check, "BUDGET", 0.0)
    monkeypatch.setattr(gpu_check, "build_stage", lambda: gpu_check.Stage("build", "b.log", 9, ["false"]))
    assert not gpu_check.run_all(tmp_path, dict(MACHINE))
    assert json.loads((tmp_path / "machine.json").read_text())["stages"]["build"]["status"] == "not run"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the benchmark would run")
def test_the_benchmark_takes_the_flags_that_it_is_given(gpu_check):
    """It reads its whole command line before it says that there is no GPU."""
    stages = gpu_check.stages_after_build(Path("folder"), Path("scratch"), gpu_check.PATHS)
    for stage in [stage for stage in stages if "haste_ext.bench" in stage.command]:
        result = subprocess.run(stage.command, cwd=ROOT, capture_output=True, text=True)
        assert "--device is cuda; torch finds no CUDA device here" in result.stderr
