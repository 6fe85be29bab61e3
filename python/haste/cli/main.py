"""The entry point of `haste`: find the command, read its flags, run it.

A command is a dataclass of settings, whose fields are its flags, and the function of its name in
`haste.cli.commands`, whose docstring is the help. Neither imports torch before the function is called.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import os
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from haste import __version__
from haste.cli.console import (
    accept_any_text,
    check_launcher,
    check_optimize_level,
    exit_on_error,
    patient_stderr,
    widen_terminal,
)
from haste.errors import UserError, shorten

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
    "export": ("write a trained DiT as a pipeline of diffusers", "haste.cli.commands:ExportConfig"),
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
        command, arguments = split_command(words)
        with patient_stderr():
            run(command, arguments)


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its arguments; argparse handles --help and --version.

    Raises:
        UserError: an unknown command, or a flag in front of it.
    """
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {what}" for name, (what, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="haste",
        usage="haste [-h] [--version] COMMAND ...",
        description="Train diffusion transformers faster, and sample from them faster.",
        epilog=f"commands:\n{listing}\n\n`haste COMMAND --help` explains the flags of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"haste {__version__}")
    if not words:
        parser.print_help()
        raise SystemExit(0)
    command, *arguments = words
    if command in COMMANDS:
        return command, arguments
    parser.parse_known_args([command])
    kind = "flag" if command.startswith("-") else "command"
    known = ("--help", "--version") if kind == "flag" else COMMANDS
    raise UserError(unknown(kind, command, known, f"the commands are {', '.join(COMMANDS)}"))


def run(command: str, arguments: list[str]) -> None:
    """Read the flags of one command and run it."""
    from haste.cli import commands

    config = read_flags(command, arguments)
    check_optimize_level(sys.flags.optimize)
    check_launcher(os.environ)
    getattr(commands, command)(config)


# ---- flags ----


def read_flags(command: str, arguments: Sequence[str]) -> Any:
    """The checked settings of a command. Raises UserError for values that cannot work."""
    import tyro

    from haste.cli import commands

    home, _, name = COMMANDS[command][1].partition(":")
    config_class = getattr(importlib.import_module(home), name)
    hints = flag_hints(config_class)
    arguments = spell_out(arguments, hints)
    default: Any = tyro.MISSING_NONPROP
    if command == "train":
        commands.list_presets_if_asked(arguments)
    if {"-h", "--help"} & set(arguments):
        print(wrap_paragraphs(inspect.getdoc(getattr(commands, command)) or ""), end="\n\n")
    elif not arguments or not arguments[0].startswith("--tyro-"):  # tyro's own, for the completion of shells
        check_words(command, arguments, hints, config_class)
    if command == "train":
        from haste.training.settings import command_config

        default = command_config(arguments)
    config = tyro.cli(
        config_class,
        prog=f"haste {command}",
        description="",
        args=arguments,
        default=default,
        registry=help_registry(config_class),
    )
    if hasattr(config, "resolved"):
        config = config.resolved()
    config.check()
    return config


def flag_hints(config_class: type) -> dict[str, Any]:
    """The type of each setting that is a flag, with its annotations, by the name of the field."""
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in fields(config_class) if "Suppress" not in str(field.type)}


def spell_out(arguments: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """The arguments with abbreviated flags in full, as argparse and so every published command accepts them.

    A beginning that several flags have in common stays as it is, and is refused as unknown.
    """
    known = flag_names(hints)
    spelled = []
    for argument in arguments:
        flag, equals, value = argument.replace("_", "-").partition("=")
        fitting = [name for name in known if name.startswith(flag)] if flag != "--" else []
        if argument.startswith("--") and (len(fitting) == 1 or flag in known):
            argument = (flag if flag in known else fitting[0]) + equals + argument.partition("=")[2]
        spelled.append(argument)
    return spelled


def flag_names(hints: Mapping[str, Any]) -> list[str]:
    """All flags, `--no-...` among them."""
    names = [name.replace("_", "-") for name in hints]
    switches = [name.replace("_", "-") for name, hint in hints.items() if hint is bool]
    return ["--help", *(f"--{name}" for name in names), *(f"--no-{name}" for name in switches)]


def is_flag(word: str) -> bool:
    return re.match(r"--?[a-z]", word, re.I) is not None and word.lower() not in ("-inf", "-infinity", "-nan")


def check_words(command: str, words: Sequence[str], hints: Mapping[str, Any], config_class: type) -> None:
    """Check that all flags exist, and that each value is of its flag's type, before tyro parses them.

    Raises:
        UserError: one sentence, for which tyro has a box of many lines.
    """
    known = flag_names(hints)
    positional = any("Positional" in str(hint) for hint in hints.values())
    every_flag = f"`haste {command} --help` lists all flags"
    given = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not is_flag(word):
            if not positional and word != "--":
                raise UserError(unknown("argument", word, known, every_flag))
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag not in known:
            raise UserError(unknown("flag", flag, known, every_flag))
        hint = bare(hints.get(name, bool))
        given.add(name)
        values = [value] if equals else []
        if hint is bool:
            if values:
                raise UserError(f"{flag} must be given without a value, got {shorten(value)}")
            continue
        many = get_origin(hint) is tuple
        item = get_args(hint)[0] if many else hint
        while rest and not equals and not is_flag(rest[0]) and (many or not values):
            values.append(rest.pop(0))
        if not values and not many:
            raise UserError(f"{flag} must be {type_name(item)}, got nothing")
        for value in values:
            if not fits(item, value):
                raise UserError(f"{flag} must be {type_name(item)}, got {shorten(value)}")
    for field in fields(config_class):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in given and "Positional" not in str(hints[field.name]):
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag} must be {type_name(hints[field.name])}, got nothing; it is required")


def unknown(kind: str, word: str, known: Collection[str], otherwise: str) -> str:
    """'unknown flag --batchsize; did you mean --batch-size?', or what is said where no name is near."""
    name = word.replace("_", "-")
    near = (
        [each for each in known if each.startswith(name)]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        or [each for each in known if name.lstrip("-") in each.lstrip("-").split("-")]
    )
    return f"unknown {kind} {shorten(word)}; " + (f"did you mean {one_of(near)}?" if near else otherwise)


def one_of(names: Sequence[object]) -> str:
    """'a, b or c'."""
    return " or ".join(filter(None, [", ".join(map(str, names[:-1])), str(names[-1])]))


def bare(hint: Any) -> Any:
    """A type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def type_name(hint: Any) -> str:
    """'an integer or None', for sentences."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is Literal:
        return one_of(get_args(hint))
    return {int: "an integer", float: "a number", str: "text", Path: "a path", type(None): "None"}[hint]


def fits(hint: Any, word: str) -> bool:
    """Whether a word can be read as a value of a type."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(each, word) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return word in map(str, get_args(hint))
    if hint is type(None):
        return word == "None"
    if hint in (int, float):
        try:
            hint(word)
        except ValueError:
            return False
    return True


# ---- help ----


def wrap_paragraphs(text: str) -> str:
    """Text with its paragraphs wrapped to the terminal."""
    width = shutil.get_terminal_size().columns
    return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in text.split("\n\n"))


def help_registry(config_class: type) -> Any:
    """The fields of a dataclass for tyro: docstrings without line breaks, and no default where the text names it."""
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()
    texts = field_docstrings(config_class)
    hints = get_type_hints(config_class, include_extras=True)

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not config_class:
            return None
        given = None if info.default is tyro.MISSING_NONPROP else info.default
        specs = []
        for field in fields(config_class):
            default = getattr(given, field.name) if given is not None else field.default
            if default is MISSING:
                default = tyro.MISSING if field.default_factory is MISSING else field.default_factory()
            text = texts.get(field.name, "")
            hint: Any = hints[field.name]
            if "[default:" in text or default in ("", ()):
                hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
            specs.append(StructFieldSpec(field.name, hint, default, text))
        return StructConstructorSpec(config_class, tuple(specs))

    return registry


def field_docstrings(config_class: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of those that it inherits from, each in one line."""
    found = {}
    for owner in reversed(config_class.__mro__[:-1]):
        (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body
        for before, after in pairwise(tree.body):  # type: ignore[attr-defined]
            match before, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
