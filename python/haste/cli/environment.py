"""What surrounds a command, held against what it must be: how Python was started, and the variables by which torchrun
and accelerate tell processes of each other."""

from __future__ import annotations

from collections.abc import Mapping

from haste.errors import UserError

LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": -1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # where there is a LOCAL_RANK


def check_processes(environment: Mapping[str, str]) -> None:
    """UserError for a variable that is no number, or out of its range, or missing beside LOCAL_RANK."""
    numbers = {name: number(environment, name) for name in LEAST if name in environment}
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE")
    if size is not None and rank >= size:
        raise UserError(f"RANK must be below WORLD_SIZE, which is {size}, got {rank}")
    if numbers.get("LOCAL_RANK", -1) == -1:  # one process
        return
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        raise UserError(f"LOCAL_RANK is set, and {' and '.join(missing)} must be too; "
                        "start several processes by torchrun or accelerate launch, one without it")  # fmt: skip


def check_docstrings(optimize: int) -> None:
    """UserError for Python that has dropped all docstrings: transformers reads its own to import."""
    if optimize > 1:
        raise UserError(f"PYTHONOPTIMIZE (python -O) must be 0 or 1, got {optimize}; transformers does not import "
                        "without docstrings")  # fmt: skip


def number(environment: Mapping[str, str], name: str) -> int:
    try:
        value = int(environment[name])
    except ValueError:
        value = None
    if value is None or value < LEAST[name]:
        raise UserError(f"{name} must be a whole number of at least {LEAST[name]}, got '{environment[name]}'")
    return value
