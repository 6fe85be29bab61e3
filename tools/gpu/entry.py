"""What a run leaves for benchmarks/gpu: which sources it verified, its document, its summary."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from kernel_sources import kernel_sources, source_hash

from gpu import records, sanitizer
from gpu.runner import ATTENTION, LOG, Run
from gpu.stage import Outcome

FILES = (LOG, "results.jsonl", "machine.json", "benchmark.json", "summary.md", "train_step", "sampling", "cifar10")


def claim(folder: Path) -> None:
    """Begins the folder of a run with its log. What the folder holds stays as it is; another run's files may not be it.

    Raises:
        ValueError: the folder holds a run's files, or is none that can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if held := [name for name in FILES if os.path.lexists(folder / name)]:
            raise ValueError(f"FOLDER must hold no files of another run, got {folder}, which holds {', '.join(held)}")
        (folder / LOG).open("xb").close()  # of two runs that begin at once, one gets an error
    except OSError as error:
        raise ValueError(f"FOLDER must be a folder that can be written, got {folder} ({error.strerror})") from error


def keep(run: Run) -> None:
    """Writes the folder anew, each file whole or not at all."""
    verified = verified_sources(run.outcomes)
    document = {
        **{key: value for key, value in run.machine.items() if key != "sanitizer_help"},
        "switches": run.switches,
        "left_out": run.left_out,
        "kernel_times": kernel_times(run.scratch),
        "host_time": (read(run.scratch / "host_time.json") or {}).get("results", []),
        "stages": {name: vars(outcome) for name, outcome in run.outcomes.items()},
        "verified": verified,
    }
    write(run.folder / "machine.json", json.dumps(document, indent=1) + "\n")
    if benchmarks := merged_benchmarks(run.scratch, run.machine.get("commit")):
        write(run.folder / "benchmark.json", json.dumps(benchmarks, indent=1) + "\n")
    write(run.folder / "summary.md", "\n".join(summary(run, document)) + "\n")


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def verified_sources(outcomes: dict[str, Outcome]) -> dict[str, str]:
    """Hash by source, for each whose operations passed every test and every sanitizer with its kernels.

    What serves several operations or groups of kernels must have served all of them. A racecheck that cannot judge a
    kernel does not stand in its way.
    """
    verified = {}
    for source in kernel_sources():
        if all(is_good(outcomes.get(stage), operation) for stage, operation in evidence(source)):
            verified[source] = source_hash(source)
    return verified


def evidence(source: str) -> Iterator[tuple[str, str]]:
    """Stages and operations that speak for a source."""
    operations = [operation for operation in records.OPERATIONS if operation in source] or records.OPERATIONS
    for operation in operations:
        sets = [kernels for kernels in ATTENTION if f"/{kernels}/" in source]
        sets = sets or ATTENTION[: 1 if operation in source else None]
        for kernels in sets if operation == records.OPERATIONS[0] else ("portable",):
            tests = kernels if operation == records.OPERATIONS[0] else "shared"
            yield f"correctness {tests}", operation
            yield from ((f"{tool} {kernels}", operation) for tool in sanitizer.TOOLS)


def is_good(outcome: Outcome | None, operation: str) -> bool:
    counts = outcome.counts.get(operation) if outcome else None
    return bool(counts and counts["passed"] and not counts["failed"] and not counts["lost"])


def kernel_times(scratch: Path) -> dict[str, dict]:
    """By set of kernels, as far as the timing stages came."""
    documents = {kernels: read(scratch / f"kernel_times_{kernels}.json") for kernels in ATTENTION}
    return {kernels: document for kernels, document in documents.items() if document}


def read(path: Path) -> dict | None:
    """A JSON document; None for one that is absent, or cut off by the end of its stage."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def merged_benchmarks(scratch: Path, commit: str | None) -> dict | None:
    """The benchmark's documents as one, in the form that `python -m haste_ext.bench table` reads."""
    documents = [document for path in sorted(scratch.glob("benchmark_*.json")) if (document := read(path))]
    if not documents:
        return None
    machine = documents[0]["machine"]
    if machine.get("commit") is None:  # a tree that came without its .git
        machine["commit"] = commit
    return {**documents[0], "results": [result for document in documents for result in document["results"]]}


def summary(run: Run, document: dict) -> Iterator[str]:
    machine = run.machine
    title = f"{machine.get('gpu', 'no GPU')}, {machine.get('date', '')}"
    yield f"# {'Rehearsal, on no GPU: ' if machine.get('rehearsal') else ''}{title}"
    yield ""
    hidden = ("sources", "sanitizer_help", "build_info")
    for key, value in machine.items():
        if key not in hidden and value not in (None, ""):
            yield f"- {key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"
    yield from (f"- switched on for what followed: {name}={value}" for name, value in run.switches.items())
    yield from (f"- left out of what followed: the {group} kernels ({why})" for group, why in run.left_out.items())
    yield from ["", "| stage | result | seconds | passed / failed / skipped / lost | |", "|---|---|---:|---|---|"]
    for name, outcome in run.outcomes.items():
        counts = ", ".join(f"{op} {' / '.join(map(str, x.values()))}" for op, x in outcome.counts.items())
        note = outcome.note.replace("|", "\\|")
        yield f"| {name} | {outcome.status} | {outcome.seconds:.0f} | {counts} | {note} |"
    yield from ["", "| source | verified |", "|---|---|"]
    yield from (f"| {source} | {'yes' if source in document['verified'] else 'no'} |" for source in kernel_sources())
    for kernels, times in document["kernel_times"].items():
        yield from ["", f"## attn_align_loss, {kernels} kernels, each alone", ""]
        yield from ["| tokens | batch | kernel | µs | of the floor | host µs |", "|---:|---:|---|---:|---:|---:|"]
        for row in times["rows"]:
            share = f"{row['floor_seconds'] / row['seconds']:.0%}" if "floor_seconds" in row else ""
            microseconds = f"{row['seconds'] * 1e6:,.1f}{' (by events)' if row['timed_by_events'] else ''}"
            host = f"{row['host_seconds'] * 1e6:,.0f}"
            yield f"| {row['tokens']} | {row['batch']} | {row['kernel']} | {microseconds} | {share} | {host} |"
    if document["host_time"]:
        yield from ["", "## Host time of forward + backward on tiny tensors", ""]
        yield from ["| operation | times a trivial Function's |", "|---|---:|"]
        yield from (f"| {result['operation']} | {result['ratio']:.2f} |" for result in document["host_time"])
    if (run.folder / "benchmark.json").exists():
        yield from [
            "",
            "`python -m haste_ext.bench table benchmark.json` prints the operations beside other ways of writing them.",
        ]
