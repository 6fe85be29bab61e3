"""Reads q and k out of any transformers model, without touching its source.

transformers dispatches every attention layer through a table of functions. One entry of that table is ours: it hands
the queries and keys, after rotary embedding and before softmax, to whoever is recording, and then calls SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "haste_recording_sdpa"

QueriesKeys = tuple[Tensor, Tensor]


class Recording:
    """The q and k that the wanted attention modules used, by layer index."""

    def __init__(self, layer_of_module: dict[nn.Module, int]) -> None:
        self._layer_of_module = layer_of_module
        self.queries_keys: dict[int, QueriesKeys] = {}

    def keep(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        layer = self._layer_of_module.get(module)
        if layer is not None:
            self.queries_keys[layer] = (query, key)


# A context variable and not an attribute of the modules: several teachers, threads and other users of the same
# transformers model never see each other's recordings.
_active: ContextVar[Recording | None] = ContextVar("haste_active_recording", default=None)


@contextmanager
def record(layer_of_module: dict[nn.Module, int]) -> Iterator[Recording]:
    """Record the listed attention modules while the context is open."""
    recording = Recording(layer_of_module)
    token = _active.set(recording)
    try:
        yield recording
    finally:
        _active.reset(token)


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
) -> tuple[Tensor, None]:
    recording = _active.get()
    if recording is not None:
        recording.keep(module, query, key)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _recording_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
