"""The tables and plots of the benchmark on CIFAR-10, made of its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from haste.generation.config import SamplingConfig
from haste.io import write_text
from haste.plotting import plot_advantage, plot_scores
from haste.tables import format_number, markdown_table


def write_report(folder: Path, results: dict[str, Any], methods: Sequence[str]) -> str:
    """Write results.md, results.png and, beside a vanilla run, advantage.png; returns the text."""
    by_method = {
        method: {run["seed"]: run["points"] for run in results["runs"] if run["method"] == method} for method in methods
    }
    by_method = {method: seeds for method, seeds in by_method.items() if seeds}
    if not by_method:
        return "no run is done yet"
    text = "\n".join([
        f"# CIFAR-10, {tokens(results)} tokens: vanilla SiT, REPA, HASTE\n", describe(results),
        *at_equal_steps(by_method), *at_equal_seconds(by_method, results), *losses(results),
    ]) + "\n"  # fmt: skip
    write_text(folder / "results.md", text)
    stops = {run["settings"]["early_stop_point"] for run in results["runs"] if run["method"] == "HASTE"}
    look = {"title": f"CIFAR-10, {tokens(results)} tokens", "stop": stops.pop() if stops else None}
    plot_scores(folder / "results.png", by_method, **look)
    if "vanilla" in by_method:
        plot_advantage(folder / "advantage.png", by_method, "vanilla", **look)
    return text


def tokens(results: dict[str, Any]) -> int:
    settings = results["runs"][0]["settings"]
    patch = settings["patch_size"] or int(settings["model"].split("/")[1])
    return (settings["resolution"] // patch) ** 2


def describe(results: dict[str, Any]) -> str:
    """How the numbers came about, in words."""
    run, teacher, classifier = results["runs"][0], results["teacher"], results["classifier"]
    settings, sampling = run["settings"], SamplingConfig(**results["sampling"])
    seeds = sorted({run["seed"] for run in results["runs"]})
    commits = sorted({run["commit"][:12] + run["commit"][40:] for run in results["runs"]})
    maps = ", ".join(f"{value:.2f}" for value in results["kl_uniform"])
    size = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in ("depth", "hidden_size", "num_heads")
                     if settings[name])  # fmt: skip
    return (
        f"`python benchmarks/cifar10/run.py`, seed {', '.join(map(str, seeds))}. {settings['model']} {size}, batch "
        f"{settings['batch_size']}, learning rate {settings['learning_rate']:g}; layer map {settings['layer_map']}, "
        f"features after block {settings['encoder_depth']}. The teacher, a ViT of width {teacher['hidden_size']} and "
        f"depth {teacher['num_hidden_layers']}, learned {teacher['steps']:,} steps by {teacher['objective']} (linear "
        f"probe {teacher['probe_accuracy']:.1%}); its aligned maps are {maps} nats from uniform. "
        f"{run['samples']:,} samples a point, {sampling.describe()}, EMA "
        f"weights, no guidance, the same noise and labels for every run. FD to {classifier['real']:,} test images in "
        f"{classifier['features']} features of a classifier that no run has seen (held-out accuracy "
        f"{classifier['held_out_accuracy']:.1%}; two halves of the test images are {classifier['split_half_fd']:.2f} "
        f"apart).\n\nCommit {', '.join(commits)}; torch {run['build']['torch_loaded']}; {run['processor']}."
    )


def at_equal_steps(by_method: dict[str, dict[int, list[dict[str, Any]]]]) -> list[str]:
    """FD and label accuracy at each point, with the standard deviation over seeds."""
    lines = []
    points = next(iter(next(iter(by_method.values())).values()))
    head = ["", *(f"step {point['step']:,}" for point in points)]
    for title, key, scale, digits in (("FD", "fd", 1.0, 2), ("Label accuracy, %", "label_accuracy", 100.0, 1)):
        rows = [
            [method, *(cell([scale * at[key] for at in point], digits) for point in zip(*seeds.values(), strict=True))]
            for method, seeds in by_method.items()
        ]
        lines.append(f"\n## {title}, at equal steps\n\n{markdown_table([head, *rows])}".rstrip())
    return lines


def cell(values: Sequence[float], digits: int) -> str:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return format_number(float(np.mean(values)), digits, spread=spread)


def at_equal_seconds(by_method: dict[str, dict[int, list[dict[str, Any]]]], results: dict[str, Any]) -> list[str]:
    """The same where each method has trained as long as the vanilla model at its points; between two points of a
    method the logarithm of the FD, and the accuracy, are taken as linear."""
    speeds = results.get("seconds_per_step")
    if not speeds or "vanilla" not in by_method:
        return []
    stops = {run["method"]: run["settings"]["early_stop_point"] for run in results["runs"]}
    steps = [point["step"] for point in next(iter(by_method["vanilla"].values()))]
    moments = [step * speeds["vanilla"] for step in steps]
    costs = ", ".join(f"{method} {seconds:.3f}" for method, seconds in speeds.items())
    text = f"\nSeconds of a step: {costs}; after its end of alignment HASTE's are vanilla's."
    lines = ["\n## At equal seconds", text]
    for title, key, scale, digits in (("FD", "fd", 1.0, 2), ("Label accuracy, %", "label_accuracy", 100.0, 1)):
        rows = [[f"{title}", *(f"{moment:,.0f} s" for moment in moments)]]
        for method, seeds in by_method.items():
            clock = [seconds_until(step, method, stops[method], speeds) for step in steps]
            found = [interpolated(points, key, clock, moments) for points in seeds.values()]
            columns = zip(*found, strict=True)
            rows.append([method, *("" if None in values else cell([scale * v for v in values], digits)
                                   for values in columns)])  # fmt: skip
        lines.append(f"\n{markdown_table(rows)}".rstrip())
    return lines


def seconds_until(step: int, method: str, stop: int, speeds: dict[str, float]) -> float:
    """Seconds of training up to a step."""
    aligned = step if stop < 0 else min(step, stop)
    return aligned * speeds[method.split(",")[0]] + (step - aligned) * speeds["vanilla"]


def interpolated(
    points: Sequence[dict[str, Any]], key: str, clock: Sequence[float], moments: Sequence[float]
) -> list[float | None]:
    """A score at some moments, None before the first point."""
    values = np.array([point[key] for point in points])
    scores = np.exp(np.interp(moments, clock, np.log(values))) if key == "fd" else np.interp(moments, clock, values)
    return [float(s) if moment >= clock[0] else None for moment, s in zip(moments, scores, strict=True)]


def losses(results: dict[str, Any]) -> list[str]:
    """The alignment losses of each run in its log."""
    runs = [run for run in results["runs"] if run["seed"] == results["runs"][0]["seed"]]
    rows = [["", *(f"step {line['step']:,}" for line in runs[0]["log"])]]
    for run in runs:
        for name in ("loss", "proj_loss", "attn_loss"):
            values = [line.get(name) for line in run["log"]]
            if any(value is not None for value in values):
                rows.append([f"{run['method']}: {name}", *(format_number(value, 3) for value in values)])
    return [f"\n## Losses in the log, seed {runs[0]['seed']}\n\n{markdown_table(rows)}".rstrip()]
