"""Runs the stages of a plan within the budget; whatever one of them does, the next runs and the folder is whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from kernel_sources import ROOT

from gpu import records, sanitizer
from gpu.stage import CRASHED, FAILED, LATE, LEFT_OUT, NOT_JUDGED, NOT_RUN, PASSED, Outcome, Stage

BUDGET = 515.0  # seconds from the start of this process to its end
GRACE = 8.0  # for a process to die and for the folder to be written
LEAST = 2.0  # with less time than this no stage begins
LOG_LIMIT = 2**20  # bytes that are kept of one stage: as many from its beginning as from its end
ATTENTION = ("portable", "hopper")
SPLIT_N72 = "HASTE_HOPPER_SPLIT_N72"
WRONG = 3  # exit status of wgmma_n72.cu
LOG = "stages.log"
CUDA_PROGRAMS = "/usr/local/cuda/bin"  # which not every machine has on its PATH


@dataclass
class Run:
    """What is known so far, and where it is kept.

    groups: kernels that the build holds and the device can run; left_out: those found wrong, with the stage that did.
    switches: environment variables that later stages run with. judged: findings of a sanitizer that are none.
    scale: of all times, less than 1 in a rehearsal. cifar10: the data set.
    """

    folder: Path
    scratch: Path
    sanitizer: str
    started: float  # by time.monotonic
    machine: dict = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    judged: list[sanitizer.Judged] = field(default_factory=list)
    scale: float = 1.0
    cifar10: Path = Path("DATA")

    @property
    def left(self) -> float:
        """Seconds that a stage could take now."""
        return self.scale * (BUDGET - GRACE) - (time.monotonic() - self.started)

    @property
    def records(self) -> Path:
        return self.folder / "results.jsonl"

    def environment(self, stage: Stage, groups: Sequence[str]) -> dict[str, str]:
        """What the stage's program sees beyond this process's own."""
        own = {"HASTE_CUDA_KERNELS": "hopper" if "hopper" in groups else "portable"} if groups else {}
        if capability := self.machine.get("capability"):
            own["TORCH_CUDA_ARCH_LIST"] = capability  # for the build, and for the test of what it holds
        return own | self.switches | stage.environment


def run_plan(plan: Sequence[Stage], run: Run, keep: Callable[[Run], None]) -> bool:
    """All stages; `keep` writes the folder after each. Whether all of them passed."""
    for stage in plan:
        try:
            outcome = attempt(stage, run)
        except Exception as error:  # what a stage left can be anything
            outcome = Outcome(FAILED, note=f"its results cannot be used: {type(error).__name__}: {error}")
        if outcome is None:
            continue
        run.outcomes[stage.name] = outcome
        print(f"{stage.name}: {describe(outcome)}", flush=True)
        if stage.kind == "probe" and outcome.status != PASSED:
            return False
        keep(run)
    return all(outcome.status in (PASSED, NOT_JUDGED) for outcome in run.outcomes.values())


def describe(outcome: Outcome) -> str:
    return f"{outcome.status}, {outcome.seconds:.0f} s{'; ' + outcome.note if outcome.note else ''}"


def attempt(stage: Stage, run: Run) -> Outcome | None:
    """Runs a stage unless there is no reason to; None for one that this machine has no use for."""
    groups = [group for group in stage.groups if group in run.groups]
    if stage.kind not in ("probe", "build"):
        if not run.groups and not run.left_out:
            return Outcome(NOT_RUN, note="the build failed")
        lacking = [group for group in (*stage.requires, *stage.groups) if group in run.left_out]
        if (stage.groups and not groups) or not set(stage.requires) <= set(run.groups):
            return Outcome(LEFT_OUT, note=f"{lacking[0]}: {run.left_out[lacking[0]]}") if lacking else None
    left = run.left
    if left < LEAST * run.scale:
        return Outcome(NOT_RUN, note="no time was left")
    status, seconds, code = execute(stage, groups, run, min(stage.limit * run.scale, left))
    return settle(stage, groups, run, Outcome(status, round(seconds, 1)), code)


def settle(stage: Stage, groups: Sequence[str], run: Run, outcome: Outcome, code: int | None) -> Outcome:
    """What an end means for the rest of the run."""
    tally = records.tally(run.records, stage.name)
    outcome.counts = tally.counts(stage.operation)
    if outcome.status != PASSED and tally.running:
        outcome.note = f"it ended in {tally.running}"
    if stage.kind == "probe" and outcome.status == PASSED:
        run.machine |= json.loads(stage.output_path(run).read_text())
    elif stage.kind == "build" and outcome.status == PASSED:
        run.machine["build_info"] = json.loads(stage.output_path(run).read_text())
        held = run.machine["build_info"].get("cuda_kernels", ())
        on_hopper = run.machine.get("capability") == "9.0"
        run.groups = ("shared", *(name for name in ATTENTION if name in held and (name != "hopper" or on_hopper)))
    elif stage.name == "wgmma n72" and outcome.status != PASSED:
        if outcome.status in (LATE, CRASHED) or code == WRONG:
            run.switches[SPLIT_N72] = "1"
            outcome.note = f"the rest runs with {SPLIT_N72}=1"
    elif stage.kind == "smoke" and outcome.status != PASSED:
        run.left_out |= dict.fromkeys(groups, f"{stage.name} {outcome.status}")
        run.groups = tuple(group for group in run.groups if group not in groups)
    elif stage.tool:
        judge(stage, groups, run, outcome, code)
    return outcome


def judge(stage: Stage, groups: Sequence[str], run: Run, outcome: Outcome, code: int | None) -> None:
    """Judge a sanitizer's stage by its log instead of its exit status."""
    log = stage.output_path(run)
    text = log.read_text(errors="replace") if log.exists() else ""
    with Log(run.folder) as kept:
        kept.write(text[-LOG_LIMIT:].encode())
    version = run.machine.get("sanitizer")
    found = sanitizer.verdict(stage.tool, version, text, list(outcome.counts), "hopper" in groups, run.judged)
    ended = found.whole and (code == 0 or (code == sanitizer.ERROR and found.any))
    for operation, counts in outcome.counts.items():
        counts["failed"] += operation in found.faulty
        if not ended:
            counts["lost"], counts["passed"] = counts["lost"] + counts["passed"], 0
    notes = [f"{len(found.findings)} findings, first: {found.findings[0]}"] if found.findings else []
    notes += [f"judged: {finding}" for finding in dict.fromkeys(found.judged)]
    if found.not_judged:
        words = f"racecheck {version} takes waits on mbarriers for hazards: {len(found.not_judged)} not judged"
        notes.append(words)
    if outcome.status in (PASSED, FAILED):
        bad = not ended or found.findings or any(x["failed"] or x["lost"] for x in outcome.counts.values())
        outcome.status = FAILED if bad else NOT_JUDGED if found.not_judged else PASSED
    if not ended:
        notes.append("the sanitizer did not come to an end that can be read")
    outcome.note = "; ".join([*notes, *filter(None, [outcome.note])])


def execute(stage: Stage, groups: Sequence[str], run: Run, limit: float) -> tuple[str, float, int | None]:
    """Status, seconds and exit status of the stage's program, which runs in a process group of its own."""
    own = run.environment(stage, groups)
    command = stage.command(run, groups)
    folders = [ROOT, ROOT / "python", ROOT / "tools"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | own
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment |= {records.FILE: str(run.records), records.STAGE: stage.name}
    environment["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), CUDA_PROGRAMS])
    begin = time.monotonic()
    with Log(run.folder) as log:
        log.write(f"== {stage.name}\n$ {' '.join([*(f'{k}={v}' for k, v in own.items()), *command])}\n".encode())
        try:
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        except OSError as error:
            log.write(f"{error}\n".encode())
            return FAILED, 0.0, None
        reader = threading.Thread(target=log.copy, args=(process.stdout,), daemon=True)
        reader.start()
        status = wait(process, limit, GRACE * run.scale)
        reader.join(timeout=GRACE * run.scale / 4)  # what left the group can hold the pipe open
        seconds = time.monotonic() - begin
        log.finish(f"-- {stage.name}: {status}, {seconds:.0f} s\n\n".encode())
    return status, seconds, process.returncode


def wait(process: subprocess.Popen, limit: float, grace: float) -> str:
    """For the end of the process, or for the end of its time; of its children none stays."""
    try:
        with tied(process):
            code = process.wait(timeout=limit)
        return PASSED if code == 0 else CRASHED if code < 0 or code > 128 else FAILED  # a shell's word for a signal
    except subprocess.TimeoutExpired:
        return LATE
    finally:  # also where this process is told to end
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a kernel that hangs may hold its process for a while
            process.wait(timeout=grace / 2)


@contextmanager
def tied(process: subprocess.Popen) -> Iterator[None]:
    """Should this process be killed outright, so is the group of `process`: the pipe to the watcher then ends."""
    words = ["sh", "-c", 'read -r _; kill -s KILL -- "-$1"', "watcher", str(process.pid)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    watcher = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, **silent)
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
        watcher.stdin.close()


class Log:
    """The one log, to which a stage's output goes as it comes; of much, the beginning and the end are kept."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / LOG).open("ab")
        self.written = 0
        self.tail: deque[bytes] = deque()
        self.tail_bytes = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish(b"")
        with self.lock:
            self.file.close()

    def copy(self, stream: BinaryIO) -> None:
        for line in stream:
            self.write(line)

    def write(self, line: bytes) -> None:
        line = without_places(line.decode(errors="replace")).encode()
        with self.lock:
            if self.file.closed:
                return
            if self.written < LOG_LIMIT // 2:
                self.file.write(line)
                self.file.flush()
            else:
                self.tail.append(line)
                self.tail_bytes += len(line)
                while self.tail_bytes > LOG_LIMIT // 2:
                    self.tail_bytes -= len(self.tail.popleft())
            self.written += len(line)

    def finish(self, line: bytes) -> None:
        with self.lock:
            self.file.writelines([*self.tail, line])
            self.tail.clear()
            self.file.flush()


def without_places(text: str) -> str:
    """The log goes into the repository: where this machine keeps its files does not."""
    places = {str(ROOT): ".", tempfile.gettempdir(): "TMP", sys.prefix: "PREFIX", str(Path.home()): "HOME"}
    for place in sorted((place for place in places if len(place) > 1), key=len, reverse=True):
        text = re.sub(re.escape(place) + r"(?![\w-])", places[place], text)
    return text
