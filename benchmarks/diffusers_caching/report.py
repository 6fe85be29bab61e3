"""The tables, made from the JSON document alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from haste.tables import NONE, format_number, markdown_table

from haste_ext.bench.report import revision, where

UNCACHED = "uncached"
# The least share of the FLOPs speed-up that the processor's time must show, by granularity.
TARGETS = {"output": 0.95, "model": 0.92, "block": 0.92, "module": 0.9}
LEGEND = """\
Speed-ups are over the first row: ×CPU of the thread's processor time, ×wall of the clock, ×FLOPs of what torch's
FlopCounterMode counts. The time of a run is the sum over its steps of the least of the rounds. Share is ×CPU over
×FLOPs: 1 where a forecast costs nothing beyond its products. Error: of the final latents, relative to the first row's,
in the 2-norm. Held: the memory of all tensors that a run leaves behind. All caches compute the same steps in full, keep
float32 and forecast with order 1. Weights are random: errors compare caches of one model, and say nothing of the
quality of images."""
COLUMNS = ("", "×CPU", "×wall", "×FLOPs", "share", "error", "held MiB", "remarks")


def report(document: Mapping[str, Any]) -> str:
    """All cases as Markdown."""
    return "\n\n".join(["# Caches around diffusers' transformers", LEGEND, *map(section, document["results"])]) + "\n"


def section(result: Mapping[str, Any]) -> str:
    machine, case, rounds = result["machine"], result["case"], result["settings"]["rounds"]
    full = ", ".join(map(str, case["full_steps"]))
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    made = (
        f"{case['num_steps']} steps, of which {full} are full; order {case['order']}, {case['dtype']}. "
        f"{where(machine)}; torch {machine['torch']}, {packages}{revision(machine)}, {machine['date']}; "
        f"{rounds} round{'s' if rounds > 1 else ''}, one thread."
    )
    return "\n\n".join([f"## {case['name']}", made, table(result), verdicts(result)]).rstrip()


def table(result: Mapping[str, Any]) -> str:
    return markdown_table([COLUMNS, *[row_cells(result, row) for row in result["rows"]]]).rstrip()


def row_cells(result: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    if not row.get("cpu_seconds"):
        return [row["name"], *[NONE] * (len(COLUMNS) - 2), row.get("absent") or row["fault"]]
    return [
        row["name"],
        f"{speedup(result, row):.2f}",
        f"{speedup(result, row, 'wall_seconds'):.2f}",
        f"{flops_speedup(result, row):.2f}",
        f"{share(result, row):.2f}",
        f"{row['error']:.1e}" if row["error"] else "0",
        format_number(row["cache_bytes"], 2, 2**-20) if row["cache_bytes"] else NONE,
        remarks(row),
    ]


def remarks(row: Mapping[str, Any]) -> str:
    """What went wrong, or was seen of the cache."""
    drift = f"later runs differ by {row['drift']:.0e}" if row["drift"] else ""
    return "; ".join(filter(None, [row["note"], row.get("fault", ""), drift]))


def verdicts(result: Mapping[str, Any]) -> str:
    """Of haste's rows: the share that is aimed at, and whether a peer is as fast at no more error."""
    lines = []
    for row in result["rows"]:
        if not row["ours"] or not row.get("cpu_seconds"):
            continue
        target = next(target for granularity, target in TARGETS.items() if granularity in row["name"])
        own = share(result, row)
        verdict = "met" if own >= target else "missed"
        ahead = [peer["name"] for peer in peers(result) if beats(result, peer, row)]
        behind = f"; faster at no more error: {', '.join(ahead)}" if ahead else ""
        lines.append(f"- {row['name']}: share {own:.2f}, target {target}: {verdict}{behind}.")
    return "\n".join(lines)


def peers(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    rows = result["rows"]
    return [row for row in rows if row.get("cpu_seconds") and not row["ours"] and not row["name"].startswith(UNCACHED)]


def beats(result: Mapping[str, Any], peer: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a peer is faster than the row at an error no larger."""
    return peer["error"] <= row["error"] and speedup(result, peer) > speedup(result, row)


def speedup(result: Mapping[str, Any], row: Mapping[str, Any], clock: str = "cpu_seconds") -> float:
    """Over the uncached run."""
    return sum(uncached_of(result)[clock]) / sum(row[clock])


def flops_speedup(result: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    return uncached_of(result)["flops"] / row["flops"]


def share(result: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    return speedup(result, row) / flops_speedup(result, row)


def uncached_of(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in result["rows"] if row["name"] == UNCACHED)
