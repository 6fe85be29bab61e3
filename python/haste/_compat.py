"""Every private part of torch and transformers that haste uses, so that a new version is checked in one place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def lerp_all_(values: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """values ← values + weight·(ends − values), all in one fused pass over the device's memory."""
    torch._foreach_lerp_(values, ends, weight)


def version(tensor: Tensor) -> int | None:
    """It changes when the tensor is written to. None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled as a whole, by its compile()."""
    return module._compiled_call_impl is not None


def flop_counter() -> FlopCounterMode:
    """torch's counter, and in its list the attention that torch runs on the CPU, which it lacks."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_attention: attention})


def slice_of(function: Any) -> tuple[int, int, int] | None:
    """Dimension, start and end of what a function of autograd's graph cuts out; None if it is no slice."""
    if function.name() != "SliceBackward0":
        return None
    return function._saved_dim, function._saved_start, function._saved_end


# ---- transformers, which is imported where it is needed ----


def sdpa_attention() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The SDPA entry of transformers' attention interface, and that of its masks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    return sdpa_attention_forward, sdpa_mask


def cached_file_if_any(source: str, file_name: str, **arguments: Any) -> str | None:
    """The path of a file of a hub name, downloaded if needed; None if it cannot be had."""
    from transformers.utils import cached_file

    no_errors = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(source, file_name, **no_errors, **arguments)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from logging its table of weights that are missing or do not fit, and from its progress bar."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(is_other)  # another level would let it log more elsewhere
    shown = is_progress_bar_enabled()
    disable_progress_bar()  # that of loading; downloads have another
    try:
        yield
    finally:
        log.removeFilter(is_other)
        if shown:
            enable_progress_bar()
