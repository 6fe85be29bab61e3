"""What sampling from xAR costs: operations, and bytes of keys and values.

`count_flops` counts a whole run, with whatever a solver does, by running the solver on an engine that only counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from haste.models.xar import XAR
from haste.models.xar_sampling import Evaluation, PartEngine, guidance_scales
from haste.samplers import PartCache, Solver


def cache_bytes(model: XAR, batch: int, guided: bool) -> int:
    """Bytes of the keys and values of a batch of images; guided runs keep those of the null class as well."""
    width = model.z_proj.out_features
    return 2 * len(model.blocks) * batch * (1 + guided) * model.entities.total * width * model.dtype.itemsize


class FlopCounter(PartEngine):
    """An engine that computes nothing: velocities are zero, and the operations that they would take are added up.

    Counted are those of the matrix products, two for each multiplication; of attention what the mask leaves.

    Args:
        table: modulations are computed once for each class and time, not in every evaluation.

    Attributes:
        flops: so far, for one image; its modulations are not shared with others of its class.
        evaluations: passes through the network so far.
        tokens: that went through it for one image, rows of the null class included.
    """

    def __init__(self, model: XAR, table: bool = True) -> None:
        super().__init__(model)
        self.model = model
        self.table = table
        self.flops = self.evaluations = self.tokens = 0
        self._modulated: set[tuple[str, float]] = set()

    def _run(self, evaluation: Evaluation, parts: Sequence[Tensor]) -> list[Tensor]:
        branches = len(evaluation.branches)
        self.evaluations += 1
        self.tokens += branches * sum(evaluation.sizes)
        self.flops += branches * network_flops(self.model, evaluation.first, evaluation.sizes)
        for modulated in {(branch, time) for branch in evaluation.branches for time in evaluation.times}:
            if not (self.table and modulated in self._modulated):
                self.flops += modulation_flops(self.model)
            self._modulated.add(modulated)
        return [part.new_zeros(branches * len(part), *part.shape[1:]) for part in parts]


def network_flops(model: XAR, first: int, sizes: Sequence[int]) -> int:
    """Operations of a pass of the entities from number `first` on, of these sizes, without its modulations."""
    width, values = model.z_proj.out_features, model.z_proj.in_features
    hidden, tokens = model.blocks[0].mlp.fc1_g.out_features, sum(sizes)
    ends = [end for _, end in model.entities.bounds[first : first + len(sizes)]]
    seen = sum(size * end for size, end in zip(sizes, ends, strict=True))  # pairs of a query and a key
    blocks = tokens * (4 * width + 3 * hidden) * width + 2 * seen * width
    return 2 * (len(model.blocks) * blocks + tokens * (2 * values + width) * width)


def modulation_flops(model: XAR) -> int:
    """Operations of the modulations of all blocks for one class and time."""
    width, frequencies = model.z_proj.out_features, model.time_embed.num_frequencies
    return 2 * width * (len(model.blocks) * 6 * width + frequencies + width)


def count_flops(model: XAR, solve: Solver, table: bool = True, cache: PartCache | None = None) -> FlopCounter:
    """Run a solver on an engine that only counts.

    Args:
        model: of any type and device; nothing of it is computed.
        solve: with the settings of the run; its random numbers are left alone.
        table: see FlopCounter.
        cache: as of `sample_parts`; forecast steps count nothing.

    Returns:
        The engine, which has `flops`, `evaluations` and `tokens` of one image.
    """
    counter, values = FlopCounter(model, table), model.z_proj.in_features
    noises = [torch.zeros(1, size, values) for size in model.entities.sizes]
    silent = dataclasses.replace(solve, step_noise=None, generator=torch.Generator(), progress=None, observe=None)
    silent.parts(counter, noises, guidance_scales(model.entities.count), cache)
    return counter
