"""The tables, made from the JSON document alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from haste.tables import markdown_table

from haste_ext.bench.measure import spread
from haste_ext.bench.report import revision, where

VANILLA, AGAIN, HASTE, STOPPED = "vanilla", "vanilla, again", "HASTE", "HASTE after τ"
ATTENTION_PART = "L_A: attention maps"
TARGET = 0.02
LEGEND = """\
Time per training step: median over the rounds, with the 20th and 80th percentile. "× vanilla" is the ratio to the
vanilla step of the same round. Memory: what is held between steps (weights, AdamW's moments, the teacher or what is
handed in for it), and the peak during a step. The teacher's queries, keys and patch tokens are handed in, unless it is
said to be included. "eager" materialises the maps as the public code does, and goes on doing so after τ. The parts are
timed by themselves, forward and backward; their share is that of the vanilla step of the same round, and their peak is
what they take beyond their operands. EMA is left out of all steps, which makes the shares look a little larger than
they are in training."""


def report(document: Mapping) -> str:
    """All cases as Markdown."""
    sections = [section(result) for result in document["results"]]
    return "\n\n".join(["# One training step", LEGEND, *sections]) + "\n"


def section(result: Mapping) -> str:
    machine, settings = result["machine"], result["settings"]
    made = (
        f"{where(machine)}; torch {machine['torch']}, haste_ext {machine['haste_ext']}{revision(machine)}, "
        f"{machine['date']}; {count(settings['rounds'], 'round')}, {count(settings['steps_per_turn'], 'step')} of each."
    )
    return "\n\n".join([f"## {title(result)}", made, step_table(result), part_table(result), verdicts(result)])


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def title(result: Mapping) -> str:
    case = result["case"]
    precision = "float32" if case["precision"] == "no" else case["precision"]
    tokens = f"{case['text_tokens']} + {case['tokens']}" if "text_tokens" in case else case["tokens"]
    return f"{case['model']}, {tokens} tokens, batch {case['batch']}, {precision}, {case['device']}"


def step_table(result: Mapping) -> str:
    rows = {row["name"]: row for row in result["rows"]}
    lines = [["step", "ms", "p20 – p80", "× vanilla", "p20 – p80", "held MiB", "peak MiB", "× vanilla"]]
    for name, row in rows.items():
        if "absent" in row:
            lines.append([name, row["absent"], *[""] * 6])
            continue
        time, ratio = spread(row["seconds"]), spread(ratios(result, row))
        cells = [
            f"{1e3 * time['median']:,.1f}",
            f"{1e3 * time['p20']:,.1f} – {1e3 * time['p80']:,.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['p20']:.3f} – {ratio['p80']:.3f}",
            f"{row['held_bytes'] / 2**20:,.0f}",
            *peak_cells(row, rows[VANILLA]),
        ]
        lines.append([name, *cells])
    return markdown_table(lines).rstrip()


def peak_cells(row: Mapping, vanilla: Mapping) -> tuple[str, str]:
    if row["peak_bytes"] is None:
        return "–", "–"
    return f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['peak_bytes'] / vanilla['peak_bytes']:.3f}"


def part_table(result: Mapping) -> str:
    lines = [["part of alignment", "ms", "share of a vanilla step", "p20 – p80", "peak MiB"]]
    for part in result["parts"]:
        time, share = spread(part["seconds"]), spread(ratios(result, part))
        spans = f"{share['p20']:.2%} – {share['p80']:.2%}"
        peak = part.get("peak_extra_bytes")
        mib = "–" if peak is None else f"{peak / 2**20:,.1f}"
        lines.append([part["name"], f"{1e3 * time['median']:,.2f}", f"{share['median']:.2%}", spans, mib])
    return markdown_table(lines).rstrip()


def verdicts(result: Mapping) -> str:
    """The two targets: what alignment costs, and what is left of it after τ."""
    rows = {row["name"]: row for row in result["rows"]}
    own = [part for part in result["parts"] if not part["name"].startswith("eager")]
    shares = {part["name"]: spread(ratios(result, part))["median"] for part in own}
    total, maps = sum(shares.values()), shares[ATTENTION_PART]
    lines = [
        f"- The attention loss takes {maps:.2%} of a step: {met(maps)}. Alignment as a whole, the projector included, "
        f"takes {total:.2%}: {met(total)}. By subtraction HASTE costs {difference(result, rows[HASTE])} more."
    ]
    if all("seconds" in rows.get(name, {}) for name in (STOPPED, AGAIN)):
        lines.append(f"- {stopped_verdict(result, rows)}")
    return "\n".join(lines)


def met(share: float) -> str:
    return f"{'under' if share < TARGET else 'not under'} {TARGET:.0%}"


def difference(result: Mapping, row: Mapping) -> str:
    ratio = spread(ratios(result, row))
    return f"{ratio['median'] - 1:.1%} (p20 {ratio['p20'] - 1:.1%}, p80 {ratio['p80'] - 1:.1%})"


def stopped_verdict(result: Mapping, rows: Mapping[str, Mapping]) -> str:
    """Noise is measured by vanilla against vanilla: the 80th percentile of how far the two are apart within a round."""
    noise = spread([abs(ratio - 1) for ratio in ratios(result, rows[AGAIN])])["p80"]
    median = spread(ratios(result, rows[STOPPED]))["median"]
    verdict = "equal" if abs(median - 1) <= noise else "not equal"
    memory = rows[STOPPED]["peak_bytes"]
    share = f" and {memory / rows[VANILLA]['peak_bytes']:.3f} × its memory" if memory is not None else ""
    return (
        f"After τ a step takes {median:.3f} × vanilla{share}. Two vanilla steps of one round are up to {noise:.1%} "
        f"apart (80th percentile), so within noise the times are {verdict}."
    )


def ratios(result: Mapping, row: Mapping) -> Sequence[float]:
    """A row's or a part's time over that of the vanilla step of the same round."""
    vanilla = next(other for other in result["rows"] if other["name"] == VANILLA)
    return [own / base for own, base in zip(row["seconds"], vanilla["seconds"], strict=True)]
