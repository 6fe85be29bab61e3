"""The tables, made from the JSON document alone."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from haste.tables import markdown_table

from haste_ext.bench.measure import spread
from haste_ext.bench.report import revision, where

UNCACHED = "uncached"
# By device and variant: the least of the FLOPs speed-up that the wall clock must show.
TARGETS = {
    "cpu": {"TaylorSeer per module": 0.9, "TaylorSeer per block": 0.9, "TaylorSeer whole model": 0.9},
    "cuda": {"TaylorSeer per module": 0.95, "TaylorSeer per block": 0.95, "TaylorSeer whole model": 0.95},
}
LEGEND = """\
Seconds per run: the whole of `haste.samplers.sample` for one batch, the median over the rounds with the 20th and 80th
percentile. The wall-clock speed-up is the uncached run's time over the row's own within each round, launched in the
same way; the FLOPs speed-up is the ratio of what torch's FlopCounterMode counts: matrix products, convolutions and
attention. Where the two are equal, their ratio is 1. Full and skipped: the median time of one call of the model of that
kind. Cache: what is kept at the end of a run. Peak: the highest memory during a run beyond what was held before it.
"uncached, fewer steps" takes as many steps as TaylorSeer has full ones. "eager" keeps finite differences per module in
dictionaries, as TaylorSeer is published. Weights are random, so the quality of images is not measured here."""
COLUMNS = (
    "run", "full of steps", "s per run", "p20 – p80", "wall clock", "FLOPs", "ratio", "p20 – p80", "ms full",
    "ms skipped", "cache MiB", "peak MiB",
)  # fmt: skip


def report(document: Mapping) -> str:
    """All cases as Markdown."""
    return "\n\n".join(["# Sampling with feature caches", LEGEND, *map(section, document["results"])]) + "\n"


def section(result: Mapping) -> str:
    machine, case, rounds = result["machine"], result["case"], result["settings"]["rounds"]
    made = (
        f"{where(machine)}; torch {machine['torch']}, haste_ext {machine['haste_ext']}{revision(machine)}, "
        f"{machine['date']}; {rounds} round{'s' if rounds > 1 else ''}{of_the_processor(case)}; "
        f"interval {case['interval']}, "
        f"order {case['order']}."
    )
    return "\n\n".join([f"## {title(result)}", made, table(result), verdicts(result)])


def title(result: Mapping) -> str:
    case = result["case"]
    tokens = f"{case['text_tokens']} + {case['tokens']}" if "text_tokens" in case else case["tokens"]
    guided = f"guidance {case['cfg_scale']:g}, " if "cfg_scale" in case else ""
    return (
        f"{case['model']}, {tokens} tokens, batch {case['batch']}, {case['num_steps']} steps, {guided}{case['dtype']}, "
        f"{case['device']}"
    )


def of_the_processor(case: Mapping) -> str:
    return ", all seconds those of the processor in one thread" if case.get("processor_time") else ""


def table(result: Mapping) -> str:
    lines = []
    for row in result["rows"]:
        cells = [row["absent"], *[""] * (len(COLUMNS) - 2)] if "absent" in row else row_cells(result, row)
        lines.append([row["name"], *cells])
    return markdown_table([COLUMNS, *lines]).rstrip()


def row_cells(result: Mapping, row: Mapping) -> list[str]:
    time, ratio = spread(row["seconds"]), spread(ratios(result, row))
    return [
        f"{row['num_full']} of {row['num_steps']}",
        f"{time['median']:.3f}",
        f"{time['p20']:.3f} – {time['p80']:.3f}",
        f"{median(wall_speedups(result, row)):.2f}×",
        f"{flops_speedup(result, row):.2f}×",
        f"{ratio['median']:.2f}",
        f"{ratio['p20']:.2f} – {ratio['p80']:.2f}",
        milliseconds(row["full_seconds"]),
        milliseconds(row["skipped_seconds"]),
        mebibytes(row["cache_bytes"] or None),
        mebibytes(row["peak_extra_bytes"]),
    ]


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):,.2f}" if seconds else "–"


def mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.1f}"


def verdicts(result: Mapping) -> str:
    targets = TARGETS[result["case"]["device"]]
    lines = []
    for row in result["rows"]:
        target = targets.get(row["name"].split(",")[0])
        if target is not None and "seconds" in row:
            ratio = median(ratios(result, row))
            verdict = "met" if ratio >= target else "missed"
            lines.append(f"- {row['name']}: {ratio:.2f} of its FLOPs speed-up in seconds; target {target}: {verdict}.")
    if result["difference"] is not None:
        lines.append(
            f"- Before it was timed: the images of TaylorSeer per module differ from the eager ones by "
            f"{result['difference']:.1e} (relative, in the 2-norm)."
        )
    return "\n".join(lines)


def uncached_of(result: Mapping, row: Mapping) -> Mapping:
    """Plain sampling, launched as the row is; eager code is launched as it is."""
    return next(r for r in result["rows"] if r["name"].split(",")[0] == UNCACHED and r["launch"] == row["launch"])


def wall_speedups(result: Mapping, row: Mapping) -> list[float]:
    """Within each round."""
    uncached = uncached_of(result, row)
    return [base / own for base, own in zip(uncached["seconds"], row["seconds"], strict=True)]


def flops_speedup(result: Mapping, row: Mapping) -> float:
    return uncached_of(result, row)["flops"] / row["flops"]


def ratios(result: Mapping, row: Mapping) -> list[float]:
    """Wall-clock speed-up over FLOPs speed-up, within each round."""
    return [speedup / flops_speedup(result, row) for speedup in wall_speedups(result, row)]
