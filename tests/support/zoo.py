"""Tiny instances, with random weights, of the transformer classes of diffusers, and a sampling loop that calls them.

zoo.json has, by class, the arguments of a tiny instance ("init") and of one call ("inputs"): a tensor is its shape and
dtype, of integers and booleans also the values; tuples, lists and dicts say which they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES: dict[str, dict] = json.loads((Path(__file__).parent / "zoo.json").read_text())

TIMES = ("timestep", "timesteps", "t", "vision_timesteps")
NEXT_TIMES = ("r_timestep", "timestep_r")  # of flow maps: where the step ends
LATENTS = ("hidden_states", "x", "vision_tokens")


@dataclass
class Call:
    """The arguments of one model call, of which `at` gives those of another step."""

    arguments: dict[str, Any]
    x: str = field(init=False)
    time: str = field(init=False)

    def __post_init__(self) -> None:
        self.x = next(name for name in LATENTS if name in self.arguments)
        self.time = next(name for name in TIMES if name in self.arguments)

    @property
    def latents(self) -> Tensor:
        """What is denoised, also where it is passed in a list of one."""
        x = self.arguments[self.x]
        return x[0] if isinstance(x, list) else x

    @property
    def scale(self) -> int:
        """The time at which there is only noise."""
        return 1 if self.arguments[self.time].is_floating_point() else 1000

    def times(self, steps: int) -> list[float]:
        """steps + 1 times, from nearly all noise to 0; whole numbers if the model takes such."""
        times = [self.scale * 0.96 * (1 - i / steps) for i in range(steps + 1)]
        return times if self.scale == 1 else [float(round(time)) for time in times]

    def at(self, x: Tensor, time: float, following: float = 0.0) -> dict[str, Any]:
        moved = dict(self.arguments)
        moved[self.x] = [x] if isinstance(moved[self.x], list) else x
        moved[self.time] = torch.full_like(moved[self.time], time)
        for name in NEXT_TIMES:
            if name in moved:
                moved[name] = torch.full_like(moved[name], following)
        return moved


def tiny_model(name: str, seed: int = 0, **changes) -> nn.Module:
    """An instance of the diffusers class `name`, of which no parameter is zero, in float32 and evaluation mode."""
    import diffusers

    torch.manual_seed(seed)
    init = {key: _value(value, None) for key, value in CLASSES[name]["init"].items()}
    return randomize(getattr(diffusers, name)(**{**init, **changes}).eval(), seed)


def tiny_call(name: str, seed: int = 0) -> Call:
    """The arguments of a call of tiny_model(name)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = CLASSES[name]["inputs"]
    arguments = {key: _value(value, generator, key) for key, value in inputs.items()}
    return Call({**arguments, "return_dict": False})


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters anew, so that each of them matters: fresh models have output layers that are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            noise = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            is_gain = parameter.dim() < 2 and name.endswith("weight")
            parameter.copy_(1 + noise if is_gain else noise)
    return model


def tensors(answer: Any) -> list[Tensor]:
    """All tensors of a model's answer, in order."""
    return list(_tensors(answer))


def _tensors(answer: Any) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, (list, tuple)):
        for part in answer:
            yield from _tensors(part)
    elif hasattr(answer, "values"):
        for part in answer.values():
            yield from _tensors(part)


@torch.no_grad()
def sample(model: nn.Module, call: Call, steps: int | Sequence[float], calls: Any = None) -> list[list[Tensor]]:
    """Euler's method; returns the tensors of the model's answer of each step.

    Args:
        model: called as model(**arguments).
        call: its arguments.
        steps: their number, or their times with the last, 0.
        calls: called in the model's place, as what enable_cache returns. [default: the model]
    """
    times = call.times(steps) if isinstance(steps, int) else steps
    x, answers = call.latents, []
    for time, following in pairwise(times):
        answer = tensors((calls or model)(**call.at(x, time, following)))
        answers.append([tensor.clone() for tensor in answer])
        x = x + (following - time) / call.scale * _velocity(x, answer[0])
    return answers


@torch.no_grad()
def last_to_run(model: nn.Module, run: Callable[[], Any]) -> nn.Module:
    """The module without children that is the last to run in the model: it runs when the blocks do not, too."""
    ran: list[nn.Module] = []
    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(lambda module, *_: ran.append(module)) for leaf in leaves]
    run()
    for hook in hooks:
        hook.remove()
    return ran[-1]


def _velocity(x: Tensor, answer: Tensor) -> Tensor:
    """The answer in the shape of x; x itself, which decays, if it has another."""
    if answer.dim() == x.dim() and answer.shape[0] == x.shape[0] and answer.shape[1] >= x.shape[1]:
        answer = answer[:, : x.shape[1]]  # DiT and PixArt predict a variance too
    return answer if answer.shape == x.shape else x


def _value(spec: Any, generator: torch.Generator | None, name: str = "") -> Any:
    if not isinstance(spec, dict):
        return spec
    if "tensor" in spec:
        dtype = getattr(torch, spec["dtype"])
        if "values" in spec:
            return torch.tensor(spec["values"], dtype=dtype).reshape(spec["tensor"])
        return torch.ones(spec["tensor"]) if "mask" in name else torch.randn(spec["tensor"], generator=generator)
    if "dict" in spec:
        items = ((int(key) if generator and key.isdigit() else key, value) for key, value in spec["dict"].items())
        return {key: _value(value, generator) for key, value in items}
    kind = tuple if "tuple" in spec else list
    return kind(_value(value, generator) for value in spec[kind.__name__])
