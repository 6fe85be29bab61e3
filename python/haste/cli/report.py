"""Carries out `haste report`: reads the runs and writes the page."""

from __future__ import annotations

from pathlib import Path

from haste.cli.flags.report import Args
from haste.errors import UserError
from haste.report.reading import read_run
from haste.report.runs import write_report


def main(args: Args) -> None:
    """Write the page, and print its path as the last line."""
    page = args.output or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    runs = [read_run(folder) for folder in args.runs]
    try:
        write_report(runs, page)
    except OSError as error:
        raise UserError(f"--output {page} cannot be written: {error.strerror}") from error
    print(page.resolve())
