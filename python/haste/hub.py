"""The Hugging Face hub: whether it answers, found out once and quickly. Its own library tries for half a minute."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

from haste.errors import UserError

PATIENCE = 2.0  # seconds


@functools.cache
def is_reachable() -> bool:
    """Whether the hub answers, through the proxy or mirror that its library is set to, within `PATIENCE`."""
    answered = []

    def ask() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)  # refuses where HF_HUB_OFFLINE is set
        except Exception:  # of which library depends on the version
            return
        answered.append(True)

    # In a thread, since no time-out ends the look-up of a name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def loading_arguments(source: str) -> dict[str, Any]:
    """The arguments of from_pretrained() about where to look: a folder and what was downloaded before need no hub."""
    return {"local_files_only": Path(source).is_dir() or not is_reachable()}


def require_source(name: str, source: str, flag: str) -> None:
    """Raise UserError if `source` is no folder, was not downloaded before, and the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir() or is_reachable() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    raise UserError(
        f"{flag} must be a folder written by save_pretrained(), or a name that was downloaded before, got {name}; "
        "the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    )
