"""Functions of tensors as CUDA graphs: captured when first called, replayed from then on.

A replay reads and writes the memory that was there at capture, so inputs are copied into tensors that stay, and the
output out of those that the graph writes to.
"""

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


class Graphed:
    """A function of tensors, replayed; one graph for every combination of shapes, types and places in memory.

    kept: the number of the argument that is used where it is; all others are copied.
    """

    def __init__(self, function: Callable[..., Any], kept: int | None = None) -> None:
        self.function = function
        self.kept = kept
        self._captured: dict[tuple, tuple[list[Tensor], Replay, Any]] = {}

    def release(self) -> None:
        """Free the graphs and what they read and write; the next call captures anew."""
        self._captured.clear()

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple(map(shape_of, inputs))
        if self.kept is not None:
            key += (inputs[self.kept].stride(), inputs[self.kept].data_ptr())
        if key not in self._captured:
            static = [tensor if number == self.kept else tensor.clone() for number, tensor in enumerate(inputs)]
            self._captured[key] = (static, *capture(self.function, static))
        static, replay, output = self._captured[key]
        for number, tensor in enumerate(inputs):
            if number != self.kept:
                static[number].copy_(tensor, non_blocking=True)
        replay()
        return _copy(output)


def shape_of(tensor: Tensor) -> tuple:
    """Shape and type."""
    return (tuple(tensor.shape), tensor.dtype)


def _copy(output: Any) -> Any:
    """The output as its caller may keep it: the next replay writes over the original."""
    if isinstance(output, Tensor):
        return output.clone()
    parts = [part.clone() if isinstance(part, Tensor) else part for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
