"""The tables on the terminal, from the JSON document alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LABELS = {  # of a case's dimensions
    "batch": "batch", "heads": "heads", "tokens": "N", "student_dim": "d student", "teacher_dim": "d teacher",
    "feature_dim": "width", "width": "width", "order": "order", "layers": "modules",
    "steps": "steps",
}  # fmt: skip
COLUMNS = ("ms", "p20 … p80", "speed", "GB/s", "GFLOP/s", "roof", "MiB", "error")
WIDTHS = (10, 21, 8, 8, 9, 7, 9, 8)
LEGEND = """\
speed: times the baseline's. GB/s, GFLOP/s: the least work over the time taken. roof: the least time that the measured
copy and matmul rates allow, over the time taken; above 100 % where a cache holds the data. MiB: peak memory beyond
inputs and results. error: the largest against float64 over what is allowed: 2 × eager's in that type + a rounding."""


def can_show(document: Mapping) -> bool:
    """Whether its results are of operations beside other ways, measured on a machine that is described."""
    described = {"haste_ext", "commit", "modified", "torch", "date", "gpu", "processor", "threads", "cpu_capability"}
    measured = {"operation", "mode", "case", "rows", "ours", "baseline"}
    results = document["results"] if isinstance(document["results"], list) else []
    holds = [(document["machine"], described), *((result, measured) for result in results)]
    return bool(results) and all(isinstance(part, dict) and keys <= part.keys() for part, keys in holds)


def headline(document: Mapping) -> str:
    machine, roofline = document["machine"], document["roofline"]
    versions = [f"haste_ext {machine['haste_ext']}{revision(machine)}", f"torch {machine['torch']}", machine["date"]]
    lines = [", ".join(filter(None, versions)), where(machine)]
    if roofline:
        matmul = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in roofline["matmul_flops_per_second"].items())
        lines.append(f"copy {roofline['copy_bytes_per_second'] / 1e9:,.1f} GB/s; matmul GFLOP/s: {matmul}")
        if roofline["exps_per_second"]:
            lines[-1] += f"; exp2 {roofline['exps_per_second'] / 1e9:,.0f} G/s"
    return "\n".join(lines)


def where(machine: Mapping) -> str:
    """The hardware in a few words."""
    if machine["gpu"]:
        return f"{machine['gpu']['name']} (sm {machine['gpu']['capability']})"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']}, {threads}, {machine['cpu_capability']}"


def revision(machine: Mapping) -> str:
    if not machine["commit"]:
        return ""
    return f" ({machine['commit'][:9]}{', modified' if machine['modified'] else ''})"


def footer(document: Mapping) -> str:
    settings = document["settings"]
    if settings is None:
        return LEGEND
    turns, turns_if_slow, seconds = (settings[key] for key in ("turns", "turns_if_slow", "min_seconds"))
    return (
        f"{LEGEND}\nContenders took turns, so that what drifts on the machine hits all alike: {turns} turns,\n"
        f"or {turns_if_slow} where a call is slow, of together at least {seconds:g} s."
    )


def table(document: Mapping) -> str:
    return "\n\n".join([headline(document), *(case_table(result) for result in document["results"]), footer(document)])


def case_table(result: Mapping) -> str:
    rows = result["rows"]
    by_name = {row["name"]: row for row in rows}
    width = max(len(row["name"]) for row in rows)
    lines = [f"{result['operation']}, {result['mode']}: {describe(result['case'])}"]
    lines.append(f"  {'':<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(COLUMNS, WIDTHS, strict=True)))
    for row in rows:
        lines.append(f"  {row['name']:<{width}}" + row_cells(row, by_name[result["baseline"]]))
    lines += [f"  {line}" for line in launching(rows)]
    for situation, results in by_name[result["ours"]].get("errors", {}).items():
        lines.append(f"  {result['ours']}'s error over eager's, {situation}: {error_ratios(results)}")
    return "\n".join(lines)


def launching(rows: Sequence[Mapping]) -> list[str]:
    """On a GPU, what the host takes to launch a call, and which calls no graph could hold."""
    host = [(row["name"], row["host_seconds"]["median"]) for row in rows if "host_seconds" in row]
    lines = ["host µs per call: " + ", ".join(f"{name} {seconds * 1e6:,.0f}" for name, seconds in host)] if host else []
    by_events = [f"{row['name']} ({row['timed_by_events']})" for row in rows if row.get("timed_by_events")]
    return lines + (["timed by events, not in a CUDA graph: " + "; ".join(by_events)] if by_events else [])


def error_ratios(results: Mapping) -> str:
    return ", ".join(f"{name} {error_ratio(accuracy)}" for name, accuracy in results.items())


def error_ratio(accuracy: Mapping) -> str:
    error, eager = accuracy["error"], accuracy["eager_error"]
    if error is None or eager is None:
        return "not finite"
    return f"{error / eager:.2f}" if eager else f"{error:.0e}, eager exact"


def describe(case: Mapping) -> str:
    sizes = ", ".join(f"{LABELS[name]} {case[name]}" for name in LABELS if name in case)
    return f"{case['dtype']}, {sizes}"


def row_cells(row: Mapping, baseline: Mapping) -> str:
    if "absent" in row:
        return f"  {row['absent']}"
    seconds = row["seconds"]
    speed = f"{baseline['seconds']['median'] / seconds['median']:.2f} x" if "seconds" in baseline else "–"
    cells = (
        f"{seconds['median'] * 1e3:.3f}",
        f"[{seconds['p20'] * 1e3:.3f}, {seconds['p80'] * 1e3:.3f}]",
        speed,
        scaled(row.get("bytes_per_second"), 1e-9, ".1f"),
        scaled(row.get("flops_per_second"), 1e-9, ".1f"),
        scaled(row.get("roofline_share"), 1, ".0%"),
        scaled(row.get("peak_extra_bytes"), 2**-20, ".1f"),
        worst_error(row),
    )
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def scaled(value: float | None, factor: float, form: str) -> str:
    return "–" if value is None else format(value * factor, form)


def worst_error(row: Mapping) -> str:
    """The largest error over what is allowed, of all situations and results."""
    checked = [accuracy for results in row.get("errors", {}).values() for accuracy in results.values()]
    if not checked:
        return "–"
    if any(accuracy["error"] is None or accuracy["allowed"] is None for accuracy in checked):
        return "not finite"
    worst = max(accuracy["error"] / max(accuracy["allowed"], 1e-300) for accuracy in checked)
    return f"{worst:.2f}" if worst < 1e3 else f"{worst:.0e}"


def host_table(document: Mapping) -> str:
    lines = [headline(document), "", f"{'host, forward + backward':<28}{'µs':>8}{'p20 … p80':>18}{'times trivial':>16}"]
    for result in document["results"]:
        for name, times in result["seconds"].items():
            median, low, high = (f"{times[key] * 1e6:.1f}" for key in ("median", "p20", "p80"))
            ratio = "" if name.startswith("trivial") else f"{result['ratio']:.2f}"
            label = f"{result['operation']}, trivial" if name.startswith("trivial") else result["operation"]
            lines.append(f"{label:<28}{median:>8}{f'{low} … {high}':>18}{ratio:>16}")
    return "\n".join(lines)
