"""The entry point of `haste`: find the command, read its flags, run it.

A command is a dataclass of settings, whose fields are its flags, and the function of its name in
`haste.cli.commands`, whose docstring is the help. Neither imports torch before the function is called.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from haste import __version__
from haste.cli.console import (
    accept_any_text,
    check_launcher,
    check_optimize_level,
    exit_on_error,
    patient_stderr,
    widen_terminal,
)

# What each command does, and the dataclass whose fields are its flags, as module:class.
COMMANDS = {
    "prepare": ("make training data from images: crop, resize, encode to latents", "haste.cli.commands:PrepareConfig"),
    "train": (
        "train a diffusion transformer: with HASTE, with REPA, or the baseline",
        "haste.training.config:TrainConfig",
    ),
    "sample": (
        "sample images from a checkpoint, every step in full or most of them forecast",
        "haste.generation.config:SampleConfig",
    ),
    "evaluate": ("measure how far samples are from real images", "haste.evaluation.config:EvaluateConfig"),
    "sweep": (
        "plot the trade-off of caching: quality against seconds, FLOPs and memory",
        "haste.sweep.config:SweepConfig",
    ),
    "report": ("show one run, or several side by side, on one page", "haste.cli.commands:ReportConfig"),
    "demo": ("train on handwritten digits, sample, and show it all on one page", "haste.cli.demo:DemoConfig"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `haste` with these arguments (default: the process's)."""
    words = list(sys.argv[1:] if argv is None else argv)
    accept_any_text()
    widen_terminal()
    # Read when torch is imported, below. Threads that spin while they wait for each other are no faster on idle cores,
    # and several times slower where another program wants one of these.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with exit_on_error(" ".join(["haste", *(word for word in words[:1] if word in COMMANDS)]), words):
        subcommand = split_command(words)
        with patient_stderr():
            run(*subcommand)


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The subcommand and what follows it; argparse answers --help, --version and unknown subcommands."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {what}" for name, (what, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="haste",
        description="Train diffusion transformers faster, and sample from them faster.",
        epilog=f"commands:\n{listing}\n\n`haste COMMAND --help` explains the flags of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"haste {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the command")
    if not words:
        parser.print_help()
        raise SystemExit(0)
    parsed = parser.parse_args(words)
    return parsed.command, parsed.arguments


def run(command: str, arguments: list[str]) -> None:
    """Read the flags of one command and run it."""
    from haste.cli import commands

    config = read_flags(command, arguments)
    check_optimize_level(sys.flags.optimize)
    check_launcher(os.environ)
    getattr(commands, command)(config)


def read_flags(command: str, arguments: Sequence[str]) -> Any:
    """The checked settings of a command. Raises UserError for values that cannot work."""
    import tyro

    from haste.cli import commands

    home, _, name = COMMANDS[command][1].partition(":")
    config_class = getattr(importlib.import_module(home), name)
    arguments = spell_out(arguments, config_class)
    defaults = {"default": commands.train_defaults(arguments)} if command == "train" else {}
    description = inspect.getdoc(getattr(commands, command))
    config = tyro.cli(config_class, prog=f"haste {command}", description=description, args=arguments, **defaults)
    if hasattr(config, "resolved"):
        config = config.resolved()
    config.check()
    return config


def spell_out(arguments: Sequence[str], flags: type) -> list[str]:
    """The arguments with abbreviated flags in full, as argparse, and so every published command, knows them.

    A beginning that two flags have in common stays as it is, and is refused as no flag.
    flags: the dataclass of the subcommand's flags.
    """
    shown = [field for field in fields(flags) if "Suppress" not in str(field.type)]
    names = {field.name.replace("_", "-") for field in shown} | {"help"}
    names |= {f"no-{field.name.replace('_', '-')}" for field in shown if isinstance(field.default, bool)}
    spelled = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        fitting = [known for known in names if known.startswith(name.replace("_", "-"))] if name else []
        if argument.startswith("--") and len(fitting) == 1:
            argument = f"--{fitting[0]}{equals}{value}"
        spelled.append(argument)
    return spelled
