"""TaylorSeer (arXiv 2503.06923) around a SiT: on most steps the blocks are not run but forecast.

What is cached are the outputs of every block's attention and MLP *before* their gates. A skipped step still runs the
embeddings, every block's modulation and the final layer; in place of a branch it adds gate(t) · F̂ to the tokens, F̂
the forecast from the snapshots of the last full steps.

    model = TaylorSeer(sit, interval=4, order=4)
    images = sample(model, noise, labels, num_steps=50)

The SiT is not touched; to be rid of the cache, use `sit` again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import haste_ext
from haste.caching.forecaster import TaylorForecaster
from haste.caching.schedule import IntervalSchedule
from haste.caching.snapshots import SnapshotRing
from haste.errors import UserError
from haste.models import SiT, SiTOutput
from haste.sampling import Evaluation


class TaylorSeer:
    """Called like the SiT that it wraps, for sampling.

    It counts the evaluations of a run, so every run begins with `start`; `haste.sampling.sample` sees to that.

    A full step is forced where the tokens change their shape, as when guidance switches off and the batch halves: the
    snapshots do not fit any more, and the history begins anew.

    Args:
        model: the SiT.
        interval: one full step in so many, counted from the last full one. 1: every step is full.
        order: of the Taylor expansion; order + 1 snapshots are kept, each of 2·depth tensors (B, N, width).
        first_enhance: so many steps at the beginning are full.
        num_steps: start a run of so many evaluations at once, one per step (for a sampling loop of your own).

    Attributes:
        num_full, num_skipped: evaluations so far in this run.

    Raises:
        UserError: settings that make no sense, by themselves or for the number of steps.
        TypeError: a model that is no SiT.
    """

    def __init__(
        self, model: SiT, interval: int = 4, order: int = 4, first_enhance: int = 2, num_steps: int | None = None
    ) -> None:
        if not isinstance(model, SiT):
            raise TypeError(f"model is a {type(model).__name__}; it must be a SiT, whose blocks TaylorSeer knows")
        self.model = model
        self.schedule = IntervalSchedule(interval, first_enhance)
        self.forecaster = TaylorForecaster(order)
        self._ring = SnapshotRing(2 * len(model.blocks), self.forecaster.num_snapshots)
        self._plan: list[Evaluation] | None = None
        if num_steps is not None:
            self.start(num_steps)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def training(self) -> bool:
        return self.model.training

    def start(self, evaluations: int | Sequence[Evaluation]) -> None:
        """Begins a run and forgets the one before.

        Args:
            evaluations: all that will follow, as `haste.sampling.evaluations` lists them; or their number, if each
                is a step of its own.
        """
        if isinstance(evaluations, int):
            evaluations = [Evaluation(step, step, 1 - step / evaluations) for step in range(evaluations)]
        num_steps = evaluations[-1].step + 1 if evaluations else 0
        num_full = len(self.schedule.full_steps(num_steps))
        if self.forecaster.order >= num_full:
            raise UserError(
                f"order is {self.forecaster.order}; {num_steps} steps at interval {self.schedule.interval} have "
                f"{num_full} full ones, so it must be at most {num_full - 1}"
            )
        self._plan = list(evaluations)
        self._ring.clear()
        self._last_full: int | None = None
        self.num_full = self.num_skipped = 0

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> SiTOutput:
        """The velocity, full or forecast; arguments as for SiT."""
        evaluation = self._next_evaluation()
        tokens, c = self.model.embed(x, t, y)
        if not self._ring.fits(tokens):
            self._ring.clear()
            self._last_full = None
        if self.schedule.is_full(evaluation.step, self._last_full):
            tokens = self._full(tokens, c, evaluation.position)
            self._last_full = evaluation.step
            self.num_full += 1
        else:
            tokens = self._forecast(tokens, c, evaluation.position)
            self.num_skipped += 1
        return SiTOutput(self.model.finish(tokens, c), [], [])

    def _next_evaluation(self) -> Evaluation:
        if self._plan is None:
            raise RuntimeError("no run has begun; call start(number of steps) before the first evaluation")
        done = self.num_full + self.num_skipped
        if done == len(self._plan):
            raise RuntimeError(f"this run had {done} evaluations and is over; call start(...) before the next run")
        return self._plan[done]

    def _full(self, tokens: Tensor, c: Tensor, position: int) -> Tensor:
        """Every block as SiTBlock.forward runs it, with a snapshot of each branch."""
        self._ring.open(position)
        for index, block in enumerate(self.model.blocks):
            m = block.modulation(c)
            branch, _ = block.attention_branch(tokens, m.shift_attn, m.scale_attn)
            self._ring.write(2 * index, branch)
            tokens = tokens + m.gate_attn.unsqueeze(1) * branch
            branch = block.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)
            self._ring.write(2 * index + 1, branch)
            tokens = tokens + m.gate_mlp.unsqueeze(1) * branch
        return tokens

    def _forecast(self, tokens: Tensor, c: Tensor, position: int) -> Tensor:
        """tokens + gate(t) · Σ_k w_k · snapshot_k, branch by branch."""
        weights = self._ring.by_slot(self.forecaster.weights(self._ring.positions, position))
        snapshots = self._ring.storage
        for index, block in enumerate(self.model.blocks):
            m = block.modulation(c)
            for module, gate in ((2 * index, m.gate_attn), (2 * index + 1, m.gate_mlp)):
                tokens = haste_ext.taylor_extrapolate(snapshots[module], weights, residual=tokens, gate=gate)
        return tokens
