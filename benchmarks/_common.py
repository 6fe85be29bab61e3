"""What the scripts of the benchmarks share: their flags, results.json, and the table and the figure made of it."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from haste.errors import UserError
from haste.io import write_text
from haste.training.config import TrainConfig

import haste_ext
from haste_ext.bench.measure import processor

ROOT = Path(__file__).resolve().parents[1]

Plot = Callable[[Mapping[str, Any], Path], None]


@dataclass
class CommonArgs:
    """The flags that every script which measures cases has; `make_parser` describes them."""

    device: str = "cpu"
    rounds: int | None = None
    threads: int | None = None
    output: Path | None = None
    plot_only: bool = False

    def check(self) -> None:
        """UserError, in one sentence, for settings that cannot work."""
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not (self.plot_only or torch.cuda.is_available()):
            raise UserError("--device must be cpu, as torch finds no CUDA device here, got cuda")
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")


def make_parser(description: str | None, rounds: Mapping[str, int]) -> argparse.ArgumentParser:
    """The common flags, by argparse: a borrowed machine may lack tyro. rounds: the default on each device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    add = parser.add_argument
    add("--device", help="cpu or cuda")
    add("--rounds", type=int, help="How often every variant has its turn. Default: "
        f"{rounds['cpu']} on the CPU, {rounds['cuda']} on a GPU")  # fmt: skip
    add("--threads", type=int, help="Of the CPU. Default: torch's choice")
    add("--output", type=Path, help="Folder of results.json, results.md and results.png; cases of earlier runs stay "
        "there, the same case is replaced. Default: the folder named after the device, beside the script")  # fmt: skip
    add("--plot-only", action="store_true", help="Measure nothing: make the table and the plot from results.json")
    return parser


def run_script(
    args: CommonArgs,
    folder: Path,
    measured: Iterable[dict[str, Any]],
    section: Callable[[Mapping[str, Any]], str],
    report: Callable[[Mapping[str, Any]], str],
    plot: Plot | str,
) -> None:
    """Measure the cases one by one, print and keep each; then write the table and the figure of all in results.json.

    folder: of the script; results go into its folder of the device unless --output says otherwise. measured: yields
    the results, and is not touched with --plot-only. section, report: the Markdown of one case, and of all. plot: what
    `import_plot` returned.
    """
    folder = args.output or folder / args.device
    if not args.plot_only:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        for result in measured:
            print(f"{section(result)}\n", flush=True)
            keep(folder, result)
    document = read_results(folder)
    write_text(folder / "results.md", report(document))
    if args.plot_only:
        print(report(document))
    if isinstance(plot, str):  # a machine without matplotlib measures all the same
        print(f"no results.png, as {plot} is not installed here; --plot-only makes it elsewhere")
    else:
        plot(document, folder / "results.png")
    print(f"wrote {folder}/results.json, results.md{'' if isinstance(plot, str) else ' and results.png'}")


def import_plot() -> Plot | str:
    """plot_cases of the script's plot.py, or the name of the package that it lacks."""
    try:
        return importlib.import_module("plot").plot_cases
    except ModuleNotFoundError as error:
        return str(error.name)


def keep(folder: Path, result: dict[str, Any]) -> None:
    """Add one case to results.json, in place of the same one measured before."""
    folder.mkdir(parents=True, exist_ok=True)
    results = read_results(folder)["results"] if (folder / "results.json").is_file() else []
    places = [place for place, other in enumerate(results) if other["case"] == result["case"]] or [len(results)]
    results[places[0] : places[0] + 1] = [result]
    write_results(folder, {"results": results})


def read_results(folder: Path, name: str = "results.json") -> dict[str, Any]:
    """results.json of a folder; UserError if it cannot be read."""
    path = folder / name
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be a file that this script wrote; it cannot be read ({error})") from error


def write_results(folder: Path, document: Mapping[str, Any], name: str = "results.json") -> None:
    write_text(folder / name, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def train_to_end(config: TrainConfig) -> Path:
    """Train, and return the run's folder; a signal that ended the training ends the script as well."""
    from haste.training.trainer import train

    result = train(config)
    if result.interrupted is not None:
        raise SystemExit(128 + result.interrupted)
    return result.folder


def provenance() -> dict[str, Any]:
    """The commit (with a mark if the code that runs differs from it), versions, and the machine."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout

    code = (":/python", ":/haste_ext", ":/csrc", ":/benchmarks/*.py")
    changed = git("status", "--porcelain", "--", *code).strip()
    return {
        "commit": git("rev-parse", "HEAD").strip() + (" with changes" if changed else ""),
        "build": haste_ext.build_info(),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
