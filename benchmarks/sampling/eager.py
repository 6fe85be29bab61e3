"""The baseline: TaylorSeer in eager code, its finite differences kept in dictionaries, module by module.

As arXiv 2503.06923 publishes it. At a full step, with d the distance to the full step before it, every attention and
MLP output F becomes T_0 = F, T_{i+1} = (T_i − T_i,old) / d; x steps later F̂ = Σ_i T_i · x^i / i! stands in for F. A
skipped step still runs every block's modulation, for the gates. Of two streams both are forecast, as it is published
for FLUX. In the baseline's favour, each term is scaled by one number and not by x^i and by 1/i! in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import factorial

import torch
from haste.models import MMDiT, ModelOutput, SiT
from haste.models.layers import Modulation
from haste.models.mmdit import Stream
from haste.models.sit_block import SiTBlock
from torch import Tensor

FIRST_ENHANCE = 2  # so many steps at the beginning are full

Terms = dict[int, Tensor]  # T_i by i, each (B, N, width)


def full_steps(num_steps: int, interval: int) -> list[int]:
    """0, 1, 5, 9, ... at interval 4: counted from the last full step."""
    return [*range(min(FIRST_ENHANCE, num_steps)), *range(FIRST_ENHANCE - 1 + interval, num_steps, interval)]


class EagerTaylorSeer:
    """Called like the model that it wraps, one model call per step; `start` begins a run."""

    training = False

    def __init__(self, model: SiT | MMDiT, interval: int, order: int) -> None:
        self.model = model
        self.interval = interval
        self.order = order
        self.start(())

    def start(self, calls: Sequence) -> None:
        self.full_steps = full_steps(len(calls), self.interval)
        self.cache: dict[Hashable, Terms] = {}
        self.last_full = 0
        self.num_full = self.num_forecast = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def cache_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for terms in self.cache.values() for x in terms.values())

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        step = self.num_full + self.num_forecast
        full = step in self.full_steps
        self.distance = step - self.last_full
        prediction = (self.joint_prediction if isinstance(self.model, MMDiT) else self.predict)(x, t, y, full)
        self.last_full = step if full else self.last_full
        self.num_full += full
        self.num_forecast += not full
        return ModelOutput(prediction, [], [])

    def predict(self, x: Tensor, t: Tensor, y: Tensor, full: bool) -> Tensor:
        tokens, c = self.model.embed(x, t, y)
        for index, block in enumerate(self.model.blocks):
            m = block.modulation(c)
            for name, gate in (("attn", m.gate_attn), ("mlp", m.gate_mlp)):
                feature = self.feature((index, name), full, partial(compute, block, name, tokens, m))
                tokens = tokens + gate.unsqueeze(1) * feature
        return self.model.finish(tokens, c)

    def joint_prediction(self, x: Tensor, t: Tensor, context: Tensor, full: bool) -> Tensor:
        model = self.model
        text, image, c = model.text(context), model.tokens(x), model.conditioning(t, context)
        for index, block in enumerate(model.joint_blocks):
            of_text, of_image = block.context_block.vectors(c), block.x_block.vectors(c)
            rows = (text, image)
            if full:
                qkv = [block.context_block.qkv(text, *of_text[:2]), block.x_block.qkv(image, *of_image[:2])]
                rows = block.attention(torch.cat(qkv, dim=1))[0].split([text.shape[1], image.shape[1]], dim=1)
            if not block.last:
                text = self.finish((index, "text"), block.context_block, text, rows[0], Modulation(*of_text), full)
            image = self.finish((index, "image"), block.x_block, image, rows[1], Modulation(*of_image), full)
        return model.finish(image, c)

    def finish(
        self, key: Hashable, half: Stream, tokens: Tensor, attended: Tensor, m: Modulation, full: bool
    ) -> Tensor:
        """The next tokens of a stream; `attended`: its rows of the joint attention's output, of a full step."""
        feature = self.feature((key, "attn"), full, partial(half.attn.proj, attended))
        tokens = tokens + m.gate_attn.unsqueeze(1) * feature
        feature = self.feature((key, "mlp"), full, partial(half.mlp_branch, tokens, m.shift_mlp, m.scale_mlp))
        return tokens + m.gate_mlp.unsqueeze(1) * feature

    def feature(self, key: Hashable, full: bool, compute: Callable[[], Tensor]) -> Tensor:
        if not full:
            return self.forecast(key)
        feature = compute()
        self.update(key, feature)
        return feature

    def update(self, key: Hashable, feature: Tensor) -> None:
        old, terms = self.cache.get(key, {}), {0: feature}
        for i in range(min(self.order, len(old))):
            terms[i + 1] = (terms[i] - old[i]) / self.distance
        self.cache[key] = terms

    def forecast(self, key: Hashable) -> Tensor:
        terms = self.cache[key]
        forecast = terms[0]
        for i in range(1, len(terms)):
            forecast = forecast + terms[i] * (self.distance**i / factorial(i))
        return forecast


def compute(block: SiTBlock, name: str, tokens: Tensor, m: Modulation) -> Tensor:
    """The output of the block's attention or MLP before its gate, (B, N, width)."""
    if name == "attn":
        return block.attention_branch(tokens, m.shift_attn, m.scale_attn)[0]
    return block.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)
