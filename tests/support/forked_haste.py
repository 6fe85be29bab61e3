"""`haste` commands as processes of their own that start at once: forked from one that has imported all they need."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "haste.cli.commands",
        "haste.training.trainer",
        "haste.generation.sample_dir",
        "haste.data.prepare",
        "sklearn.datasets",
    ]
)


def start_haste(words: list[str], output: Path, **environment: str) -> multiprocessing.Process:
    """Start `haste WORDS`, with one thread; what it prints is written to `output`."""
    process = FORKS.Process(target=_run, args=(words, str(output), environment))
    process.start()
    return process


def start_ranks(words: list[str], outputs: list[Path]) -> list[multiprocessing.Process]:
    """Start `haste WORDS` as processes that work together, one per output, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": str(len(outputs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start_haste(words, output, **together, ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, output in enumerate(outputs)
    ]


def finish(process: multiprocessing.Process, output: Path) -> str:
    """What the command has printed, once it has ended well."""
    process.join(timeout=300)
    assert process.exitcode == 0, output.read_text()[-3000:]
    return output.read_text()


def _run(words: list[str], output: str, environment: dict[str, str]) -> None:
    import torch
    from haste.cli.main import main

    # As in a process of its own: forkserver's workers would outlive a killed command, being children of the server.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    torch.set_num_threads(1)
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(target, stream)
    main(words)
