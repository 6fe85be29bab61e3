"""How much memory a cache takes, known before its first step, and what is said where it does not fit.

Of a model on the meta device, which has no weights and no values, what leaves its blocks and is read afterwards is
found from the graph that autograd records: in place of each block's output the run has a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from haste._compat import slice_of
from haste.caching.adapters import OpaqueModel, can_take_apart, is_made_in_parts
from haste.caching.cached_model import MOST_AHEAD, CachedModel
from haste.caching.config import CacheConfig
from haste.caching.discovery import Discovery, Executed, NoSeamError, Place, floats, refill, stub
from haste.caching.forecaster import Forecaster
from haste.caching.parts import CachedParts
from haste.caching.seams import Output, StoreSpec, make_seams, spec_of
from haste.errors import UserError
from haste.validation import shown


def cache_bytes(
    model: nn.Module,
    config: CacheConfig,
    inputs: int | Mapping[str, Any],
    dtype: torch.dtype | None = None,
    input_shape: Sequence[int] | None = None,
    calls: int = 1,
) -> int:
    """Bytes that a cache will take: cached features, and for haste's own models the corrections of the forecast steps
    in a row. (Heun's sampler needs one correction more.)

        with torch.device("meta"):
            model = FluxTransformer2DModel(**config).to(torch.bfloat16)
            inputs = {"hidden_states": torch.empty(1, 4096, 64, dtype=torch.bfloat16), ...}
        cache_bytes(model, FAST, inputs)

    Args:
        inputs: the keyword arguments of one call of any model, with tensors on its device. The model is run some
            times, which on the meta device takes a moment and no memory. Or, of a model of haste's families, the images
            at once, both halves of a guided batch counted.
        dtype: of the features; by default the model's. With a number of images alone.
        input_shape: (C, H, W) of one x, or what noise has instead, from the family's `layout`, with a number of images
            alone. Needed for granularity "output", whose features have this shape.
        calls: model calls at one time, such as 2 for guidance in two calls. With the arguments of a call.

    Raises:
        UserError: a model that cannot be cached so.
        ValueError: granularity "output" with a number of images and without input_shape.
    """
    if config.cache == "none":
        return 0
    if isinstance(inputs, int):
        return _bytes_of_images(model, config, inputs, dtype, input_shape)
    if not isinstance(inputs, Mapping):
        raise UserError(f"inputs must be the keyword arguments of a call, or a number of images, got {shown(inputs)}")
    slots = Forecaster.of(config).order + 1
    return calls * slots * max(map(_bytes, _stores(model, config, inputs)))


def check_memory(
    model: nn.Module,
    config: CacheConfig,
    images: int,
    guided: bool = False,
    free: int | None = None,
    input_shape: Sequence[int] | None = None,
) -> None:
    """Refuse a cache of one of haste's models that does not fit into memory.

    Args:
        images: at once.
        free: bytes; by default what the device of the model has left.
        input_shape: as of `cache_bytes`.

    Raises:
        UserError: it does not fit; the message has the largest number of images that does.
    """
    config = config.in_parts() if is_made_in_parts(model) else config
    rows = 2 * images if guided else images
    needed = cache_bytes(model, config, rows, input_shape=input_shape)
    free = free_bytes(next(model.parameters()).device) if free is None else free
    if needed <= free:
        return
    per = "" if config.cache == "delta-dit" else f" per {config.granularity}"
    message = (f"the cache{per} takes {needed / 2**30:.1f} GiB for {images} images at once, and {free / 2**30:.1f} GiB "
               "are free")  # fmt: skip
    if config.granularity == "module" and config.cache != "delta-dit":
        whole = cache_bytes(model, replace(config, granularity="model"), rows)
        if whole <= free:
            raise UserError(f"{message}; --granularity model takes {whole / 2**30:.1f} GiB")
    fitting = images * free // needed
    would = f"{fitting} images at once (--per-proc-batch-size) would fit" if fitting else "not even one image fits"
    raise UserError(f"{message}; {would}")


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        (available,) = (line for line in file if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1])


# ---- haste's own models ----


def _bytes_of_images(
    model: nn.Module,
    config: CacheConfig,
    rows: int,
    dtype: torch.dtype | None,
    input_shape: Sequence[int] | None,
) -> int:
    if is_made_in_parts(model):
        if input_shape is None:
            raise ValueError("input_shape must be that of one image's noise for images made in parts, got None")
        slots = CachedParts(model, config).forecaster.order + 1
        return slots * rows * prod(input_shape) * (dtype or next(model.parameters()).dtype).itemsize
    if not can_take_apart(model, config):
        raise UserError(f"inputs must be the keyword arguments of a call for a {type(model).__name__}, got {rows}")
    cached = CachedModel(model, config)
    if isinstance(cached.transformer, OpaqueModel) and input_shape is None:
        raise ValueError('input_shape must be (C, H, W) for granularity "output", got None')
    granularity, slots = cached.granularities[0], cached.forecaster.order + 1
    tokens, dim = max(each.features_shape(input_shape or ()) for each in cached.granularities)
    ahead = 0
    if granularity.looks_ahead:
        ahead = MOST_AHEAD if config.full_steps else min(MOST_AHEAD, config.resolved_interval - 1)
    features, corrections = granularity.modules * slots * tokens, ahead * (tokens + 1)  # and the conditioning
    return (features + corrections) * rows * dim * (dtype or cached.dtype).itemsize


# ---- any model ----


def check_fits(
    model: nn.Module, config: CacheConfig, slots: int, specs: Sequence[StoreSpec], discover: Callable[[], Discovery]
) -> None:
    """Refuse features that do not fit into the free memory of their device, before it is taken.

    Args:
        slots: the number of full calls whose features are held.
        specs: the features of one.
        discover: runs the model once more, to find out what would fit.

    Raises:
        UserError: they do not fit; the message has a granularity that does, if there is one.
    """
    device = specs[0].device
    if device.type not in ("cpu", "cuda") or slots * _bytes(specs) <= (free := free_bytes(device)):
        return
    ways = ["a lower order", "smaller images"]
    for granularity in () if config.cache == "delta-dit" else ("model", "output"):
        try:
            smaller = max(map(_bytes, _stores_of(discover(), replace(config, granularity=granularity))))
        except NoSeamError:
            continue
        if slots * smaller <= free:
            ways.insert(0, f"granularity {granularity}, which takes {slots * smaller / 2**30:.2f} GiB")
            break
    raise UserError(
        f"the cache of {type(model).__name__} per {config.granularity} must fit into the {free / 2**30:.2f} GiB that "
        f"are free, got {slots * _bytes(specs) / 2**30:.2f} GiB; take {', '.join(ways[:-1])} or {ways[-1]}"
    )


def _bytes(specs: Sequence[StoreSpec]) -> int:
    return sum(spec.bytes for spec in specs)


@torch.no_grad()
def _stores(model: nn.Module, config: CacheConfig, inputs: Mapping[str, Any]) -> list[list[StoreSpec]]:
    """The features of a full call; of Δ-DiT's two groups of blocks, only one of which is held at a time, of each."""

    def run(args: tuple, kwargs: dict) -> Any:
        return model(*args, **kwargs)

    if config.granularity == "output" and config.cache != "delta-dit":
        return [Output(run((), dict(inputs))).stores()]
    return _stores_of(Discovery(model, run, (), dict(inputs)), config)


def _stores_of(discovery: Discovery, config: CacheConfig) -> list[list[StoreSpec]]:
    if config.granularity == "output" and config.cache != "delta-dit":
        return [Output(discovery.answer).stores()]
    on_meta = any(tensor.is_meta for tensor in floats(discovery.answer))
    if not on_meta or (config.granularity == "module" and config.cache != "delta-dit"):
        return [seam.stores() for seam in make_seams(config, discovery)]
    last = [spec_of(tensor) for tensor in read_after_blocks(discovery)]
    if config.cache != "delta-dit":
        return [last]
    depth = len(discovery.blocks)
    config.check_depth(depth)
    front = discovery.blocks[config.resolved_cached_blocks(depth) - 1]
    return [last, [spec_of(tensor) for tensor in floats(front.leaving)]]


def read_after_blocks(discovery: Discovery) -> list[Tensor]:
    """The tensors that leave the last block, or the last block of each list, and that the rest of the model reads.

    Where it reads only some of their rows (tokens), those rows. They have shapes, and on the meta device no values.

    Raises:
        NoSeamError: what other blocks return is read too.
    """
    made: list[tuple[Place, Tensor, Any]] = []

    def leave(block: Executed) -> nn.Module:
        def answer(args: tuple, kwargs: dict) -> Any:
            # Copies, as the model may write to what a block returns, which autograd forbids for leaves of its graph.
            fresh = [torch.empty_like(t, requires_grad=True).clone() for t in floats(block.leaving)]
            made.extend((block.place, tensor, tensor.grad_fn) for tensor in fresh)
            return refill(block.leaving, iter(fresh))

        return stub(block.place.module, answer)

    with torch.enable_grad():
        answer = discovery.again({block.place: leave(block) for block in discovery.blocks})
    readers = _readers(floats(answer), {function for *_, function in made})
    read = [(place, _rows_read(tensor, readers[function])) for place, tensor, function in made if function in readers]
    if not {place for place, _ in read} <= set(discovery.lasts):
        raise NoSeamError("granularity must be output for this model, whose answer depends on more than what its last "
                          "block returns")  # fmt: skip
    return [tensor for _, tensor in read]


def _readers(answer: Sequence[Tensor], functions: set[Any]) -> dict[Any, list[Any]]:
    """For each of these functions of autograd's graph behind an answer those that take what it returns."""
    readers: dict[Any, list[Any]] = {tensor.grad_fn: [None] for tensor in answer if tensor.grad_fn in functions}
    ahead = {tensor.grad_fn for tensor in answer if tensor.grad_fn is not None}
    seen = set(ahead)
    while ahead:
        function = ahead.pop()
        for following, _ in function.next_functions:
            if following in functions:
                readers.setdefault(following, []).append(function)
            elif following is not None and following not in seen:
                seen.add(following)
                ahead.add(following)
    return readers


def _rows_read(tensor: Tensor, readers: Sequence[Any]) -> Tensor:
    """The rows of the second dimension that these functions read: one slice, or all."""
    slices = {None if reader is None else slice_of(reader) for reader in readers}
    if tensor.dim() < 3 or len(slices) > 1 or None in slices:
        return tensor
    ((dim, start, end),) = slices  # type: ignore[misc]
    return tensor[:, start:end] if dim == 1 else tensor
