"""Both kinds of evaluation as CUDA graphs: captured at the first call, replayed for the rest of the run and the next.

A replay reads and writes the memory that was there at capture. Images, times, labels and weights are therefore copied
into tensors that stay; the snapshots stay by themselves, and a full evaluation writes its features into a tensor of its
own, which is copied to the ring's slot of the moment. So one graph of each kind serves all steps and slots. Where
guidance changes the batch, or the snapshots move, others are captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # on a side stream before the capture: libraries set up their workspaces

Replay = Callable[[], None]


def capture(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Replay, Any]:
    """What repeats function(*inputs) on what the inputs then hold, and the output that it leaves anew each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    return graph.replay, output


class _Graphed:
    """One graph for every combination of shapes, types and places in memory that `_key` tells apart."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._captured: dict[tuple, tuple[list[Tensor], Replay, Any]] = {}

    def release(self) -> None:
        """Lets go of the graphs and of what they read and write; the next call captures anew."""
        self._captured.clear()

    def _run(self, copied: Sequence[Tensor], kept: Sequence[Tensor], arrange: Callable[..., tuple]) -> tuple:
        key = (*map(_shape, copied), *((*_shape(tensor), tensor.stride(), tensor.data_ptr()) for tensor in kept))
        if key not in self._captured:
            static = [tensor.clone() for tensor in copied]
            self._captured[key] = (static, *capture(self.function, arrange(*static, *kept)))
        static, replay, output = self._captured[key]
        for tensor, new in zip(static, copied, strict=True):
            tensor.copy_(new, non_blocking=True)
        replay()
        return output


class GraphedSkipped(_Graphed):
    """skipped(x, t, y, snapshots, weights), replayed; the snapshots are read where they are."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, snapshots: Tensor, weights: Tensor) -> Any:
        output = self._run((x, t, y, weights), (snapshots,), lambda x, t, y, weights, kept: (x, t, y, kept, weights))
        return _copy(output)


class GraphedCorrections(_Graphed):
    """corrections(t, y, snapshots, weights) of one evaluation, replayed; the snapshots are read where they are."""

    def __call__(self, t: Tensor, y: Tensor, snapshots: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        output = self._run((t, y, weights), (snapshots,), lambda t, y, weights, kept: (t, y, kept, weights))
        return tuple(tensor.clone() for tensor in output)


class GraphedCorrected(_Graphed):
    """corrected(x, added, c), replayed."""

    def __call__(self, x: Tensor, added: Tensor, c: Tensor) -> Any:
        return _copy(self._run((x, added, c), (), lambda *inputs: inputs))


class GraphedFull(_Graphed):
    """full(x, t, y, out), replayed; `out` is filled from the tensor that the graph writes to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._features: dict[tuple, Tensor] = {}

    def release(self) -> None:
        super().release()
        self._features.clear()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Any:
        if _shape(out) not in self._features:
            self._features[_shape(out)] = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        features = self._features[_shape(out)]
        output = self._run((x, t, y), (features,), lambda *inputs: inputs)
        out.copy_(features)
        return _copy(output)


GRAPHED = {
    "full": GraphedFull,
    "skipped": GraphedSkipped,
    "corrections": GraphedCorrections,
    "corrected": GraphedCorrected,
}


def _shape(tensor: Tensor) -> tuple:
    return (tuple(tensor.shape), tensor.dtype)


def _copy(output: Any) -> Any:
    """The output as its caller may keep it: the next replay writes over the original."""
    if isinstance(output, Tensor):
        return output.clone()
    first, *rest = output
    return type(output)(first.clone(), *rest) if hasattr(output, "_fields") else (first.clone(), *rest)
