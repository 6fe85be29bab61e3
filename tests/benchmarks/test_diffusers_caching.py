"""The benchmark of caches around diffusers' transformers: equal full steps, honest counts, faults that are shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from benchmark_scripts import script_folder
from haste.errors import UserError

ROOT = Path(__file__).parents[2] / "benchmarks" / "diffusers_caching"

with script_folder(ROOT):
    import report
    import rounds
    import run
    import variants
    from cases import FULL_STEPS, NUM_STEPS, make_case

SIZES = {
    "flux": {"width": 64, "tokens": 16, "text": 4},
    "dit": {"width": 64, "size": 8},
    "pixart": {"width": 64, "size": 8, "text": 5},
    "hunyuan-video": {"width": 64, "frames": 2, "size": 4, "text": 10},
}


def tiny(name):
    return make_case(name, **SIZES[name])


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("name", SIZES)
def test_diffusers_per_module_computes_the_same_full_steps(name):
    case = tiny(name)
    sampler = variants.diffusers_modules(case)
    paths = [path for path, _ in case.model.named_modules()]
    queries = [path for path in paths if re.fullmatch(r"transformer_blocks\.0\.attn1?\.to_q", path)]
    calls = count_calls(sampler.transformer.get_submodule(queries[0]))
    sampler()
    assert len(calls) == len(FULL_STEPS)


def test_fewer_steps_have_as_many_calls_as_a_cache_has_full_steps():
    case = tiny("dit")
    calls = count_calls(case.model)
    variants.fewer_steps(case)()
    assert len(calls) == len(FULL_STEPS)


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        broken = variants.Variant("broken", lambda case: 1 / 0)
        absent = variants.Variant("elsewhere", variants.uncached, absent="a package")
        patch.setattr(rounds, "VARIANTS", [*variants.VARIANTS[:5], broken, absent])
        return rounds.measure(tiny("dit"), rounds=1) | {"packages": run.packages()}


def row(measured, name):
    return next(row for row in measured["rows"] if row["name"] == name)


def test_a_case_counts_flops_errors_and_memory(measured):
    full, fewer, default, lite, modules = measured["rows"][:5]
    assert full["error"] == 0 and full["flops"] == fewer["flops"] * NUM_STEPS // len(FULL_STEPS)
    assert full["cache_bytes"] == 0
    assert default["error"] == 0 and "hooks nothing" in default["note"]
    assert "no module named proj_out" in lite["note"]
    assert 0 < modules["error"] < fewer["error"]
    # 6 blocks, 2 modules each, 2 factors of 2 images of 16 tokens of width 64 in float32
    assert modules["cache_bytes"] == 6 * 2 * 2 * 2 * 16 * 64 * 4
    assert [len(each["cpu_seconds"]) for each in measured["rows"][:5]] == [28, 7, 28, 28, 28]
    assert not any(each["drift"] for each in measured["rows"][:5])


def test_faults_and_absent_packages_are_rows(measured):
    assert "ZeroDivisionError" in row(measured, "broken")["fault"]
    text = report.report({"results": [measured]})
    assert "ZeroDivisionError" in text and "a package is not installed here" in text


def test_a_fault_of_a_later_run_is_noted():
    case = tiny("dit")
    runs = []

    def begin():
        runs.append(1)
        if len(runs) > 2:
            raise RuntimeError("stale state")

    sampler = variants.Sampler(case, case.model, case.model, begin=begin)
    latents = rounds.first_run(sampler, {})
    times = rounds.time_in_rounds({"stale": sampler}, {"stale": latents}, rounds=2)
    assert "stale state" in times["stale"]["fault"]


def test_the_verdict_names_a_peer_that_is_faster_at_no_more_error():
    rows = [
        {"name": "uncached", "ours": False, "error": 0.0, "flops": 8, "cpu_seconds": [8.0], "wall_seconds": [8.0]},
        {"name": "peer", "ours": False, "error": 0.1, "flops": 2, "cpu_seconds": [2.0], "wall_seconds": [2.0]},
        {"name": "haste model", "ours": True, "error": 0.1, "flops": 2, "cpu_seconds": [2.5], "wall_seconds": [2.5]},
    ]
    (verdict,) = report.verdicts({"rows": rows}).splitlines()
    assert "share 0.80" in verdict and "missed" in verdict and "peer" in verdict
    rows[1]["error"] = 0.2
    assert "peer" not in report.verdicts({"rows": rows})


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--threads", "2"], ["--model", "unet"]])
def test_flags_that_cannot_work_are_named(flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = run.parse(flags)
    with pytest.raises(UserError, match=flags[0]):
        args.check()
        make_case(args.model[0])
