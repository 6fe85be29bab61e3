"""tools/gpu_check without a GPU: its stages name what is there, and stand-ins for them fail, hang and crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu import entry, records, runner, sanitizer, stand_in
from gpu.plan import KINDS, plan
from gpu.runner import Run, run_plan
from gpu.stage import Outcome, Stage

from haste_ext.bench.__main__ import main as bench

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools/gpu_check")]
GROUPS = ("shared", "portable", "hopper")
SHORT, LONG = 0.5, 60.0  # limits of a stage that hangs, and of one that does not


def gpu_check(*arguments: object, **settings: object) -> subprocess.CompletedProcess:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, **settings)


def rehearse(folder: Path, faults: dict[str, str], stages: list[Stage] | None = None, scale: float = 1.0) -> Run:
    """The stages that hang have little time and all others have much, so that a busy machine changes nothing."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    run = Run(folder, scratch, "none", time.monotonic(), scale=scale)
    chosen = stand_in.rehearsed(stages or plan(), faults)
    limits = {"hangs": SHORT}
    run_plan([replace(s, limit=limits.get(faults.get(s.name), LONG)) for s in chosen], run, entry.keep)
    return run


def document(run: Run) -> dict:
    return json.loads((run.folder / "machine.json").read_text())


def statuses(run: Run) -> dict[str, str]:
    return {name: stage["status"] for name, stage in document(run)["stages"].items()}


def test_the_stages_name_what_is_there_and_come_in_their_order():
    lines = gpu_check("--dry-run").stdout.splitlines()
    stages = plan()
    assert len(lines) == len(stages) + 1 and lines[-1] == "together at most 515 s" and runner.BUDGET < 520
    kinds = [stage.kind for stage in stages]
    assert list(dict.fromkeys(kinds)) == list(KINDS) and kinds == sorted(kinds, key=KINDS.index)
    for line in lines[:-1]:
        named = [word for word in line.split() if word.startswith(("tests/", "tools/", "benchmarks/"))]
        assert all((ROOT / path).exists() for path in named), line
        assert named or "-m haste_ext.bench" in line
    assert str(ROOT) not in "".join(lines)


def test_stages_can_be_chosen():
    assert [stage.name for stage in plan(only=["probe"])] == ["probe"]
    names = [stage.name for stage in plan(only=["timing", "smoke"])]
    assert names[:2] == ["probe", "earlier build"] and names[2:] == [s.name for s in plan()[2:8]]
    assert "built" in gpu_check("--dry-run", "--only", "compile").stdout
    assert "invalid choice: 'tests'" in gpu_check("--dry-run", "--only", "tests").stderr


def test_a_folder_of_wheels_that_is_none_is_refused(tmp_path):
    result = gpu_check("--dry-run", "--sanitizer-wheels", tmp_path / "absent")
    assert result.returncode == 2 and "--sanitizer-wheels must be a folder, got" in result.stderr


@pytest.mark.parametrize(("what", "last"), [("training", ["train_step"]), ("sampling", ["1", "8", "64"])])
def test_whole_training_steps_and_sampling_runs_are_runs_of_their_own(what, last):
    lines = gpu_check("--dry-run", f"--{what}").stdout.splitlines()[:-1]
    assert [line.split()[0] for line in lines[:6]] == ["probe", "build", "smoke", "smoke", "wgmma", "smoke"]
    assert [line for line in lines if "timing" in line or "haste_ext.bench" in line] == []
    found = [line.partition(" --batch-size ")[2].partition(" ")[0] or line.split()[0] for line in lines[-len(last) :]]
    assert found == last
    results = {"results.json", "results.md", "results.png"}
    assert len({"machine.json", "summary.md", "stages.log", "results.jsonl"} | results) <= 8


def test_only_one_kind_of_run_at_a_time():
    for words in (("--sampling", "--training"), ("--training", "--only", "smoke")):
        result = gpu_check("--dry-run", *words)
        assert result.returncode == 2 and "not allowed with argument" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the benchmarks would run")
@pytest.mark.parametrize("what", ("operations", "training", "sampling", "cifar10"))
def test_the_benchmarks_take_the_flags_that_they_are_given(what, capsys):
    """They read their whole command line before they say that there is no GPU."""
    run = Run(Path("folder"), Path("scratch"), "none", 0.0)
    stages = [stage for stage in plan(what) if stage.kind in ("benchmark", "training", "sampling")]
    for stage in stages[-1:] if what == "sampling" else stages:
        command = stage.command(run, GROUPS)
        if "haste_ext.bench" in command:
            with pytest.raises(SystemExit):
                bench(command[command.index("haste_ext.bench") + 1 :])
            errors = capsys.readouterr().err
        else:
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
            errors = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr
        assert "--device" in errors and "torch finds no CUDA device here" in errors


def test_cifar10_is_named_where_it_lies(tmp_path):
    result = gpu_check("--dry-run", "--cifar10", tmp_path / "absent")
    assert result.returncode == 2 and "--cifar10 must be CIFAR-10 as image files, got" in result.stderr
    (tmp_path / "data").mkdir()
    *_, last, _ = gpu_check("--dry-run", "--cifar10", tmp_path / "data").stdout.splitlines()
    assert last.startswith("cifar10 (training") and "--tokens 256" in last
    assert gpu_check(tmp_path / "out", "--cifar10", tmp_path / "data", "--rehearse").returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_one_sentence_says_so(tmp_path):
    result = gpu_check(tmp_path)
    assert result.returncode == 2
    assert result.stderr == "gpu_check needs a GPU and a CUDA build of torch, and torch finds none here\n"


def test_a_folder_in_which_nothing_was_begun_serves_again(tmp_path):
    for _ in range(2):
        assert gpu_check(tmp_path, "--rehearse", "probe=fails").returncode == 2
    assert not list(tmp_path.iterdir())


def test_a_whole_rehearsal_leaves_few_files_beside_what_the_folder_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = gpu_check(tmp_path, "--rehearse", "--commit", "1234abc")
    assert result.returncode == 0, result.stdout + result.stderr
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"notes.txt", "machine.json", "summary.md", "stages.log", "results.jsonl", "benchmark.json"}
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["commit"] == "1234abc" and found["rehearsal"] and found["left_out"] == found["switches"] == {}
    assert set(found["verified"]) == set(found["sources"]), "every stage passed"
    assert found["sanitizer"] == "2025.3.1.0" and found["kernel_times"].keys() == {"portable", "hopper"}
    benchmark = json.loads((tmp_path / "benchmark.json").read_text())
    assert benchmark["machine"]["commit"] == "1234abc" and len(benchmark["results"]) == 3
    assert found["host_time"] == [stand_in.RESULT]
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert str(ROOT) not in text and "Rehearsal, on no GPU" in text and "- sanitizer: 2025.3.1.0" in text


def state(folder: Path) -> dict[str, tuple[float, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.iterdir()}


@pytest.mark.parametrize("by_environment", (False, True))
@pytest.mark.parametrize("name", entry.FILES)
def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_is(name, by_environment, tmp_path):
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("of an earlier run")
    before = state(tmp_path)
    words = ([], {"env": {**os.environ, "OUT": str(tmp_path)}}) if by_environment else ([tmp_path], {})
    result = gpu_check(*words[0], "--training", "--rehearse", **words[1])
    assert result.returncode == 2 and result.stdout == ""
    sentence = f"FOLDER must hold no files of another run, got {tmp_path}, which holds {name}"
    assert result.stderr.splitlines()[-1] == f"gpu_check: error: {sentence}"
    assert state(tmp_path) == before


def test_every_file_that_a_run_leaves_is_known_as_one(tmp_path):
    assert gpu_check(tmp_path, "--rehearse").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} <= set(entry.FILES)
    assert all(str(Path("F") / name) in gpu_check_commands() for name in ("train_step", "sampling", "cifar10"))


def gpu_check_commands() -> list[str]:
    run = Run(Path("F"), Path("S"), "none", 0.0)
    stages = [stage for what in ("training", "sampling", "cifar10") for stage in plan(what)]
    return [word for stage in stages for word in stage.command(run, GROUPS)]


@pytest.mark.parametrize("folder", ("file", "file/below", "/proc", "/proc/below", "results"))
def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "results/results.jsonl").mkdir(parents=True)
    result = gpu_check(tmp_path / folder, "--rehearse")
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("gpu_check: error: FOLDER must ") and str(tmp_path / folder) in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("fault", stand_in.FAULTS)
def test_a_machine_that_cannot_be_probed_ends_the_run(fault, tmp_path):
    result = gpu_check(tmp_path, "--rehearse", f"probe={fault}")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("what", ("training", "sampling"))
def test_the_other_runs_go_on_past_a_fault_too(what, tmp_path):
    first = "train_step" if what == "training" else "caching"
    result = gpu_check(tmp_path, f"--{what}", "--rehearse", f"{first}=crashes", "smoke portable=crashes")
    assert result.returncode == 1 and f"{first}: crashed" in result.stdout
    assert what == "training" or "sampling, batch 64: passed" in result.stdout


STAGES = ("smoke portable", "timing hopper", "correctness shared", "compile", "racecheck hopper", "benchmark shared")


@pytest.mark.parametrize("fault", stand_in.FAULTS)
def test_whatever_a_stage_does_the_others_run_and_it_loses_its_own_results_alone(fault, tmp_path):
    run = rehearse(tmp_path, dict.fromkeys(STAGES, fault))
    status = {"fails": "failed", "hangs": "out of time", "crashes": "crashed"}[fault]
    found = document(run)
    left_out = [name for name, s in statuses(run).items() if s == "left out"]
    assert left_out == ["timing portable", "correctness portable"]
    assert {name for name, s in statuses(run).items() if s == status} == set(STAGES)
    assert {name for name, s in statuses(run).items() if s == "passed"} == {s.name for s in plan()} - {
        *STAGES,
        *left_out,
    }
    assert found["left_out"] == {"portable": f"smoke portable {status}"}
    assert found["stages"]["correctness shared"]["counts"]["token_cosine_loss"] == counts(passed=4)
    assert found["stages"]["correctness shared"]["counts"]["taylor_extrapolate"] == counts(lost=4)
    assert found["stages"]["correctness shared"]["note"] == "it ended in taylor_extrapolate_blocks 0"
    assert found["stages"]["racecheck hopper"]["counts"]["attn_align_loss"] == counts(lost=4), "it has no summary"
    assert {Path(source).name for source in found["verified"]} == {"token_cosine_loss.cu"}
    assert found["kernel_times"] == {} and len(json.loads((tmp_path / "benchmark.json").read_text())["results"]) == 2
    log = (tmp_path / "stages.log").read_text()
    assert f"it {fault}" in log and f"-- compile: {status}" in log
    assert f"| compile | {status} |" in (tmp_path / "summary.md").read_text()


def counts(passed=0, failed=0, skipped=0, lost=0):
    return {"passed": passed, "failed": failed, "skipped": skipped, "lost": lost}


@pytest.mark.parametrize("fault", stand_in.FAULTS)
def test_wrong_kernels_are_left_out_of_every_command_that_follows(fault, tmp_path):
    found = rehearse(tmp_path, {"smoke shared": fault, "smoke hopper": fault})
    assert [name for name, s in statuses(found).items() if s == "left out"] == [
        "timing hopper", "correctness shared", "correctness hopper", "memcheck hopper", "racecheck hopper",
        "synccheck hopper", "initcheck hopper", "host time", "benchmark network", "benchmark shared",
    ]  # fmt: skip
    after = (tmp_path / "stages.log").read_text().partition("-- smoke hopper")[2]
    assert "HASTE_CUDA_KERNELS=hopper" not in after and "shared" not in after.replace("benchmark shared", "")
    assert "compile portable stood in" in after and "benchmark portable stood in" in after
    only = {Path(source).name for source in document(found)["verified"]}
    assert "attn_align_loss_forward.cu" in only and not only & {"token_cosine_loss.cu", "device.cu"}


@pytest.mark.parametrize(("fault", "switched"), [("", False), ("fails", True), ("hangs", True), ("crashes", True)])
def test_a_doubtful_n72_switches_the_other_form_on(fault, switched, tmp_path):
    stages = [stage for stage in plan() if stage.kind in ("probe", "build", "smoke", "timing")]
    run = rehearse(tmp_path, {"wgmma n72": fault} if fault else {}, stages)
    assert document(run)["switches"] == ({"HASTE_HOPPER_SPLIT_N72": "1"} if switched else {})
    before, _, after = (tmp_path / "stages.log").read_text().partition("== smoke hopper")
    assert "HASTE_HOPPER_SPLIT_N72" not in before
    assert after.count("HASTE_HOPPER_SPLIT_N72=1") == (3 if switched else 0)
    assert statuses(run)["smoke hopper"] == "passed"


def test_a_probe_that_cannot_be_compiled_switches_nothing_on(tmp_path):
    stages = [s for s in plan() if s.kind in ("probe", "build")]
    broken = replace(plan()[4], command=lambda run, groups: ["sh", "-c", "exit 1"])
    run = rehearse(tmp_path, {}, stages)
    assert runner.attempt(broken, run).status == "failed" and run.switches == {}


def test_the_budget_holds_though_everything_hangs(tmp_path):
    """In a hundredth of the time, from the smoke test on."""
    scale, stages = 0.01, plan()
    hanging = [stage.name for stage in stages[6:]]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = Run(tmp_path, scratch, "none", time.monotonic())
    chosen = stand_in.rehearsed(stages, dict.fromkeys(hanging, "hangs"))
    run_plan(chosen[:6], run, entry.keep)  # these stand in
    run.scale, run.started = scale, time.monotonic()
    run_plan(chosen[6:], run, entry.keep)
    taken = time.monotonic() - run.started
    assert taken < scale * 520, f"{taken:.1f} s"
    found = statuses(run)
    assert [found[name] for name in ("timing hopper", "memcheck hopper")] == ["out of time"] * 2
    assert found["benchmark attn_align_loss"] == "not run"
    assert document(run)["stages"]["benchmark attn_align_loss"]["note"] == "no time was left"
    assert document(run)["verified"] == {}


def test_what_fails_to_build_is_not_run(tmp_path):
    run = rehearse(tmp_path, {"build": "crashes"})
    assert list(statuses(run).values()) == ["passed", "crashed", *["not run"] * (len(plan()) - 2)]
    assert "the build failed" in (tmp_path / "summary.md").read_text()


def test_a_device_of_another_kind_has_no_use_for_hoppers_kernels(tmp_path):
    stages = [replace(s, command=machine_of("8.0")) if s.kind == "probe" else s for s in stand_in.rehearsed(plan(), {})]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = Run(tmp_path, scratch, "none", time.monotonic())
    assert run_plan(stages, run, entry.keep)
    assert [name for name in statuses(run) if "hopper" in name or "n72" in name] == []
    assert statuses(run)["correctness portable"] == "passed"


def machine_of(capability):
    machine = json.dumps({**stand_in.MACHINE, "capability": capability})
    return lambda run, groups: ["sh", "-c", f"echo '{machine}' > {run.scratch / 'probe.json'}"]


def test_results_that_are_cut_off_are_no_results(tmp_path):
    """A stage that is killed in the middle of a write leaves half a document."""
    stages = {stage.name: stage for stage in plan()}
    chosen = [stages[name] for name in ("probe", "build", "timing hopper", "benchmark shared", "timing portable")]
    broken = lambda path: lambda run, groups: ["sh", "-c", f"printf '[{{' > {run.scratch / path}"]  # noqa: E731
    run = rehearse(tmp_path, {}, chosen[:2])
    for stage, name in zip(chosen[2:4], ("kernel_times_hopper.json", "benchmark_shared.json"), strict=True):
        run_plan([replace(stage, command=broken(name))], run, entry.keep)
    assert document(run)["kernel_times"] == {} and not (tmp_path / "benchmark.json").exists()
    build = replace(stages["build"], command=broken("build.json"), name="a broken build")
    assert not run_plan([build], run, entry.keep)
    assert "its results cannot be used" in document(run)["stages"]["a broken build"]["note"]


def hanging(folder: Path, scratch: Path) -> subprocess.Popen:
    """A rehearsal in a stage that hangs, past all that it prints."""
    scratch.mkdir()
    words = [*TOOL, folder, "--rehearse", "correctness shared=hangs"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(words, env=environment, preexec_fn=heed_signals, **streams)
    wait_for(lambda: "it hangs" in text(folder / "stages.log"))
    assert stand_ins(folder)
    return process


def heed_signals() -> None:
    """The tests themselves may run where some are ignored, as under nohup, which a program inherits."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
def test_told_to_end_it_ends_its_stage_and_leaves_what_it_has(number, tmp_path):
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    process = hanging(folder, scratch)
    process.send_signal(number)
    assert process.communicate(timeout=20) == (None, "") and process.returncode == 128 + number
    wait_for(lambda: not stand_ins(folder))
    assert list(scratch.iterdir()) == []
    found = json.loads((folder / "machine.json").read_text())
    assert found["stages"]["timing hopper"]["status"] == "passed" and "correctness shared" not in found["stages"]
    assert records.tally(folder / "results.jsonl", "correctness shared").counts()["token_cosine_loss"]["passed"] == 4


def test_killed_outright_it_leaves_no_program_behind(tmp_path):
    process = hanging(tmp_path / "run", tmp_path / "scratch")
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: not stand_ins(tmp_path / "run"), seconds=2.0)  # with no limit the stand-in sleeps for an hour


def test_a_process_that_ends_in_time_takes_its_watcher_along(tmp_path):
    process = subprocess.Popen(["true"], start_new_session=True)
    watchers = lambda: [p for p in Path("/proc").glob("[0-9]*/cmdline") if f"watcher\0{process.pid}\0" in text(p)]  # noqa: E731
    with runner.tied(process):
        wait_for(watchers)
    assert watchers() == []
    process.wait()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def stand_ins(folder: Path) -> list[str]:
    """Process numbers of stand-ins that write into this folder."""
    marker = f"GPU_CHECK_RECORDS={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if marker in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_of_a_long_output_the_beginning_and_the_end_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOG_LIMIT", 4000)
    stages = plan(only=["probe"])
    code = f"print('first'); [print(i, {str(ROOT)!r} + '/file') for i in range(2000)]; print('last')"
    talks = replace(stages[0], name="talks", kind="smoke", command=lambda run, groups: [sys.executable, "-c", code])
    run = rehearse(tmp_path, {}, plan(only=["smoke"])[:2])
    assert run_plan([talks], run, entry.keep)
    log = (tmp_path / "stages.log").read_text()
    assert "first" in log and "last" in log and "\n0 ./file" in log and "\n1000 " not in log and len(log) < 10_000
    assert str(ROOT) + "/" not in log, "no place of the machine is kept"


def test_a_program_that_is_absent_is_a_failure(tmp_path):
    run = rehearse(tmp_path, {}, plan(only=["smoke"])[:2])
    absent = Stage("absent", "smoke", 5, lambda run, groups: ["no-such-program"])
    assert runner.attempt(absent, run).status == "failed" and "no-such-program" in (tmp_path / "stages.log").read_text()


def all_good() -> dict[str, Outcome]:
    stages = [stage for stage in plan() if stage.kind in ("correctness", "sanitizers")]
    return {s.name: Outcome("passed", 1.0, {op: counts(passed=3) for op in records.OPERATIONS}) for s in stages}


def verified(outcomes: dict[str, Outcome]) -> set[str]:
    return {Path(source).name for source in entry.verified_sources(outcomes) if "hopper/" not in source}


def test_a_kernel_that_passes_everything_is_verified():
    found = entry.verified_sources(all_good())
    assert set(found) == set(entry.kernel_sources())
    assert all(digest == entry.source_hash(source) for source, digest in found.items())


@pytest.mark.parametrize("stage", ("correctness shared", *(f"{tool} portable" for tool in sanitizer.TOOLS)))
@pytest.mark.parametrize("bad", (counts(passed=3, failed=1), counts(passed=3, lost=1), counts(skipped=3), None))
def test_one_failure_or_loss_is_enough_for_a_kernel_to_be_unverified(stage, bad):
    outcomes = all_good()
    outcomes[stage].counts["token_cosine_loss"] = bad
    found = verified(outcomes)
    assert "token_cosine_loss.cu" not in found and "device.cu" not in found, "that serves all operations"
    assert {"taylor_extrapolate.cu", "attn_align_loss_forward.cu"} <= found
    del outcomes[stage]
    assert "token_cosine_loss.cu" not in verified(outcomes)


def test_each_path_is_verified_by_itself():
    outcomes = all_good()
    outcomes["synccheck hopper"].counts["attn_align_loss"] = counts(passed=3, failed=1)
    found = entry.verified_sources(outcomes)
    assert not [source for source in found if "hopper/" in source]
    assert "csrc/kernels/cuda/attn_align_loss_forward.cu" in found and "csrc/kernels/cuda/paths.cu" not in found
