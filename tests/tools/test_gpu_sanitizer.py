"""What gpu_check makes of compute-sanitizer: its options by version, its findings, those that are judged."""

from __future__ import annotations

import re
import stat
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from gpu import entry, sanitizer, stand_in
from gpu.plan import plan
from gpu.runner import Run, run_plan
from gpu.sanitizer import Judged, findings, verdict

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "benchmarks/gpu/judged_false_positives.md"
BOTH = ("token_cosine_loss", "taylor_extrapolate")
WRITE = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void haste::cuda::(anonymous namespace)::extrapolate_kernel<float>(Arguments)+0x160
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x400100001 is misaligned
=========
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void haste::cuda::hopper::forward_kernel<__half>(Arguments)+0x90
=========     and Read access at void haste::cuda::hopper::forward_kernel<__half>(Arguments)+0x170 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
DEADLOCK = RACE.replace("Error: Race reported between Write access at", "Error: Potential deadlock detected at")
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
LOST = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""


def test_findings_are_read_with_their_details():
    (finding,) = findings(WRITE)
    assert finding.splitlines()[0] == "Invalid __global__ write of size 4 bytes" and "extrapolate_kernel" in finding
    assert len(findings(RACE)) == 1 and findings(CLEAN) == [] and len(findings(WRITE + RACE)) == 2
    assert findings(LOST) == ["Error: Target application terminated before first instrumented API call"]


def test_a_finding_is_the_operations_whose_kernel_it_names():
    assert verdict("memcheck", "2025.3.1", WRITE, BOTH, False, []).faulty == {"taylor_extrapolate"}
    named = WRITE.replace("extrapolate_kernel", "forward_kernel")
    assert verdict("memcheck", "2025.3.1", named, BOTH, False, []).faulty == {"token_cosine_loss"}
    assert verdict("memcheck", "2025.3.1", LOST, BOTH, False, []).faulty == set(BOTH)
    assert verdict("memcheck", "2025.3.1", CLEAN, BOTH, False, []).faulty == set()


def test_the_kernel_that_has_a_name_of_its_own():
    sources = {path: path.read_text() for path in (ROOT / "csrc/kernels/cuda").rglob("*.cu*")}
    for operation, kernel in sanitizer.KERNEL_OF.items():
        holders = {path.name for path, text in sources.items() if re.search(rf"\b{kernel}\(", text)}
        assert holders and all(operation in name for name in holders)


@pytest.mark.parametrize(
    ("version", "mbarriers", "judged"),
    [
        ("2025.3.1.0", True, False),
        ("2025.4.1.0", True, True),
        ("2026.1.0", True, True),
        ("2025.3.1.0", False, True),
        (None, True, False),
    ],
)
def test_an_old_racecheck_does_not_judge_kernels_with_mbarriers(version, mbarriers, judged):
    found = verdict("racecheck", version, RACE, ["attn_align_loss"], mbarriers, [])
    assert (len(found.findings), len(found.not_judged)) == ((1, 0) if judged else (0, 1))
    assert found.faulty == ({"attn_align_loss"} if judged else set()) and found.whole
    assert verdict("racecheck", version, DEADLOCK, ["attn_align_loss"], mbarriers, []).findings, "that it can judge"
    assert verdict("synccheck", version, RACE, ["attn_align_loss"], mbarriers, []).findings


def test_a_judged_false_positive_does_not_count_and_its_reason_is_kept():
    known = Judged("racecheck", "hopper::forward_kernel", "Write access .*|nothing", "the wait orders them")
    found = verdict("racecheck", "2026.1", RACE, ["attn_align_loss"], True, [known])
    assert found.findings == [] and found.faulty == set() and found.judged[0].endswith(": the wait orders them")
    for other in (replace(known, tool="memcheck"), replace(known, kernel="joint"), replace(known, words="Read first")):
        assert verdict("racecheck", "2026.1", RACE, ["attn_align_loss"], True, [other]).findings


def test_the_list_in_the_repository_can_be_read():
    assert all(entry.reason for entry in sanitizer.judged_false_positives(PAGE))


def test_rows_of_the_list(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text() + "| racecheck | `forward_kernel` | `Write\\|Read` | ordered by a wait |\n")
    assert sanitizer.judged_false_positives(page)[-1] == Judged(
        "racecheck", "forward_kernel", "Write\\|Read", "ordered by a wait"
    )
    for row in (
        "| racecheck | forward_kernel | `x` | reason |",
        "| valgrind | `k` | `w` | reason |",
        "| memcheck | `k` | `w` | |",
    ):
        page.write_text(PAGE.read_text() + row + "\n")
        with pytest.raises(ValueError, match=r"rows of page.md must be \| tool \| `kernel`"):
            sanitizer.judged_false_positives(page)


def test_options_are_those_that_the_version_has():
    new = "  --check-warpgroup-mma arg (=yes)\n  --racecheck-memcpy-async arg\n  --show-backtrace arg (=yes)"
    words = {tool: sanitizer.command("cs", tool, new, Path("log")) for tool in sanitizer.TOOLS}
    for tool, own in words.items():
        assert own[:3] == ["cs", "--tool", tool] and own[own.index("--show-backtrace") + 1] == "device"
        assert ("--report-api-errors" in own) == ("--check-warpgroup-mma" in own) == (tool == "memcheck")
        assert ("--racecheck-memcpy-async" in own) == (tool == "racecheck") and "--check-bulk-copy" not in own
        assert "--racecheck-deadlock-timeout" not in own
    assert "--check-warpgroup-mma" not in sanitizer.command("cs", "memcheck", "", Path("log"))


def test_a_sanitizer_that_came_as_a_wheel_is_taken(tmp_path):
    scratch, wheels = tmp_path / "scratch", tmp_path / "wheels"
    wheels.mkdir()
    assert sanitizer.find(wheels, scratch) == sanitizer.find(None, scratch), "the machine's own"
    with zipfile.ZipFile(wheels / "nvidia_cuda_sanitizer_api-13.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nvidia/cu13/bin/compute-sanitizer", "#!/bin/sh\n")
        wheel.writestr("nvidia/cu13/bin/libsanitizer.so", "")
    program = Path(sanitizer.find(wheels, scratch))
    assert program == scratch / "sanitizer/nvidia/cu13/bin/compute-sanitizer" and program.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(
    ("tool", "log", "code", "status", "verified"),
    [
        ("memcheck", CLEAN, 0, "passed", True),
        ("memcheck", WRITE, 9, "failed", False),
        ("memcheck", LOST, 0, "failed", False),
        ("memcheck", CLEAN, 1, "failed", False),  # the program that was watched failed
        ("memcheck", CLEAN, 9, "failed", False),  # it says that it found something, in words that are not understood
        ("racecheck", RACE, 9, "not judged", True),
        ("racecheck", DEADLOCK, 9, "failed", False),
        ("synccheck", RACE, 9, "failed", False),
    ],
)
def test_a_stage_is_what_its_log_says(tool, log, code, status, verified, tmp_path):
    """In a rehearsal whose sanitizer is an old one, on Hopper's kernels."""
    name, scratch = f"{tool} hopper", tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "words").write_text(log)
    stages = stand_in.rehearsed(plan(), {})
    stage = next(stage for stage in stages if stage.name == name)
    watched = f"cp {scratch}/words {scratch}/{stage.output}; exit {code}"

    def command(run, groups):  # records of the stand-in, then this log
        return ["sh", "-c", " ".join(map(repr, stage.command(run, groups))) + "; " + watched]

    stages[stages.index(stage)] = replace(stage, command=command)
    run = Run(tmp_path, scratch, "none", time.monotonic())
    assert run_plan(stages, run, entry.keep) == (status in ("passed", "not judged"))
    outcome = run.outcomes[name]
    assert outcome.status == status
    assert ("csrc/kernels/cuda/hopper/attn_align_loss_forward.cu" in entry.verified_sources(run.outcomes)) == verified
    assert (status == "not judged") == ("takes waits on mbarriers for hazards: 1 not judged" in outcome.note)
    assert log.splitlines()[-1] in (tmp_path / "stages.log").read_text()
    assert run.outcomes[f"{tool} portable"].status == "passed"
