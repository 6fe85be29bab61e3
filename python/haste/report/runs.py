"""The page of `haste report`: runs with their curves, previews, throughput, end of alignment and settings."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from haste.errors import UserError, in_one_line
from haste.evaluation.pictures import heading, mark_step, robust_limits, smooth
from haste.evaluation.scores import alignment_end, read_records
from haste.evaluation.style import DARK, LIGHT, Theme, save, styled, thousands
from haste.report.page import (
    facts,
    figure,
    folded_section,
    paragraph,
    render_page,
    section,
    table,
    themed_figure,
    write_page,
)
from haste.training.config import TrainConfig

CURVES = {
    "loss": "Velocity loss (mean squared error)",
    "proj_loss": "Feature loss (−cosine)",
    "attn_loss": "Attention loss (cross-entropy, nats)",
    "grad_norm": "Length of the gradient",
    "images_per_second": "Pictures per second",
}
SHOWN_PREVIEWS = 3  # of each run, spread over its length


@dataclass(frozen=True)
class Run:
    """What a run's folder tells. stop: the step at which alignment ended, None if it did not or there was none."""

    name: str
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    previews: Sequence[Path]
    stop: int | None

    @property
    def steps(self) -> int:
        return self.log[-1]["step"]

    def median(self, key: str, aligned: bool) -> float | None:
        """Over the lines of the log with alignment or without it; the first line, which warms up, is left out."""
        values = [line[key] for line in self.log[1:] if line["aligned"] == aligned and line.get(key) is not None]
        return statistics.median(values) if values else None

    def last(self, key: str) -> float | None:
        """The mean over the last tenth of the log."""
        values = [line[key] for line in self.log[-max(1, len(self.log) // 10) :] if line.get(key) is not None]
        return statistics.mean(values) if values else None


def read_run(folder: Path) -> Run:
    """UserError if the folder holds no run that has begun."""
    log = read_records(folder / "log.jsonl")
    if not log:
        raise UserError(f"{folder} holds no log.jsonl with a line in it; it must be the folder of a run of haste train")
    try:
        settings = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no settings of a run: {in_one_line(error)}") from error
    previews = sorted((folder / "previews").glob("*.png"))
    return Run(folder.resolve().name, settings, log, previews, alignment_end(folder))


def write_report(runs: Sequence[Run], page: Path) -> None:
    """Everything about these runs on one page that needs no other file."""
    names = ", ".join(run.name for run in runs)
    html = render_page(
        f"{'Runs' if len(runs) > 1 else 'Run'} {names}",
        " ".join(describe(run) for run in runs),
        facts(*headline(runs[0])) if len(runs) == 1 else "",
        curves_section(runs),
        previews_section(runs),
        numbers_section(runs),
        settings_section(runs),
    )
    write_page(page, html)


def describe(run: Run) -> str:
    """One sentence."""
    if not any(line["aligned"] for line in run.log):
        taught = "without a teacher"
    elif run.stop is None:
        taught = f"taught throughout by {run.settings['enc_type']}"
    else:
        taught = f"taught by {run.settings['enc_type']} until step {run.stop:,}"
    return f"{run.name}: {run.settings['model']} on {run.settings['data_dir']}, {run.steps:,} steps, {taught}."


def headline(run: Run) -> list[tuple[str, str]]:
    values = (
        (f"{run.steps:,}", "steps"),
        (number(run.last("loss"), 4), "velocity loss at the end"),
        (number(run.last("images_per_second"), 1), "pictures per second at the end"),
        ("never" if run.stop is None else f"{run.stop:,}", "step at which alignment ended"),
    )
    return list(values)


def curves_section(runs: Sequence[Run]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        paths = {theme.name: Path(folder) / f"{theme.name}.png" for theme in (LIGHT, DARK)}
        for theme in (LIGHT, DARK):
            draw_curves(paths[theme.name], runs, theme)
        picture = themed_figure(paths["light"], paths["dark"], "Losses, gradient and throughput over training steps")
    return section("Curves", picture)


def draw_curves(path: Path, runs: Sequence[Run], theme: Theme) -> None:
    """A panel for each quantity that any run has, a colour for each run: faint as logged, bold smoothed."""
    present = [key for key in CURVES if any(line.get(key) is not None for run in runs for line in run.log)]
    columns = min(3, len(present))
    rows = -(-len(present) // columns)
    with styled(theme):
        chart, panels = plt.subplots(rows, columns, squeeze=False, figsize=(4.4 * columns, 3.2 * rows))
        for axes in panels.flat[len(present) :]:
            axes.set_visible(False)
        for axes, key in zip(panels.flat, present, strict=False):
            everything = []
            for place, run in enumerate(runs):
                points = [(line["step"], line[key]) for line in run.log if line.get(key) is not None]
                if not points:
                    continue
                steps, values = np.array(points, dtype=np.float64).T
                colour = theme.series[place % len(theme.series)]
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0)
                axes.plot(steps, smooth(values), color=colour, label=run.name)
                everything.append(values)
            axes.set(title=CURVES[key], xlabel="Training step", ylim=robust_limits(np.concatenate(everything)))
            axes.set_xlim(0, max(run.steps for run in runs))
            thousands(axes)
            if len(runs) == 1 and runs[0].stop is not None:
                mark_step(axes, runs[0].stop, "alignment ends", theme)
        if len(runs) > 1:
            handles, names = panels[0, 0].get_legend_handles_labels()
            chart.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(names))
        chart.subplots_adjust(wspace=0.28, hspace=0.5)
        heading(chart, ", ".join(run.name for run in runs))
        save(chart, path)


def previews_section(runs: Sequence[Run]) -> str:
    shown = []
    for run in runs:
        spread = np.unique(np.linspace(0, len(run.previews) - 1, SHOWN_PREVIEWS).round().astype(int))
        for path in [run.previews[index] for index in spread] if run.previews else ():
            shown.append(figure(path, f"Pictures drawn by {run.name}", f"{run.name}, step {int(path.stem):,}"))
    if not shown:
        return ""
    note = paragraph("Drawn by the averaged student, every time from the same noise.")
    return section("Previews", note, f'<div class="previews">{"".join(shown)}</div>')


def numbers_section(runs: Sequence[Run]) -> str:
    """A line for each run: what it reached, and what a step took with alignment and without."""
    header = ("Run", "Steps", "Velocity loss", "Alignment ended", "Pictures/s aligned", "Pictures/s after",
              "TFLOP/s", "MFU", "Peak GiB", "Steps left out")  # fmt: skip
    rows = [
        (
            run.name,
            f"{run.steps:,}",
            number(run.last("loss"), 4),
            "never" if run.stop is None else f"{run.stop:,}",
            number(run.median("images_per_second", aligned=True), 1),
            number(run.median("images_per_second", aligned=False), 1),
            number(run.last("teraflops"), 3),
            number(run.last("mfu"), 3),
            number(run.last("peak_memory_gib"), 2),
            sum(line.get("skipped_steps") or 0 for line in run.log),
        )
        for run in runs
    ]
    note = "Pictures per second are medians over the lines of the log; loss, TFLOP/s and memory are those of the end."
    return section("Numbers", table(header, rows), paragraph(note))


def settings_section(runs: Sequence[Run]) -> str:
    """The settings in which any run differs from the trainer's own values, a column for each run."""
    own = asdict(TrainConfig())
    names = [name for name in own if any(run.settings.get(name, own[name]) != own[name] for run in runs)]
    rows = [(f"--{name.replace('_', '-')}", *(run.settings.get(name, "") for run in runs)) for name in names]
    return folded_section("Settings", table(("Flag", *(run.name for run in runs)), rows))


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
