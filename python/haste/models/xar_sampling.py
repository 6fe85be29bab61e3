"""Sampling from xAR: one evaluation of the parts in flight against the keys and values of those that are finished.

`PartSampler` is the engine of `haste.samplers.Solver.parts`. It gives the numbers of the public loop with less work:

- Keys and values stand in buffers that are allocated once. Each evaluation writes those of the parts that it is given,
  and a part's queries read the buffer up to the part's own end. That is the block-causal mask, so none is made, and any
  number of parts may be in flight, each at a time of its own.
- A finished part goes through the network once more, at t = 0, together with what is evaluated next: its keys and
  values are then those that later parts see. The last part never does. Rows of the null class are computed when
  guidance asks for them, so the first part, which is not guided, has none.
- The modulation of the blocks depends on class and time alone. It is computed once for all steps of a run where that
  table fits into memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from haste.cuda_graphs import Graphed
from haste.models.xar import XAR, XARBlock
from haste.models.xar_modulations import TABLE_BYTES, Modulations
from haste.samplers import PartCache, Solver

logger = logging.getLogger(__name__)

BRANCHES = ("cond", "uncond")  # in the order of their rows


class Evaluation(NamedTuple):
    """One pass through the network.

    first: the first part that it is given. sizes: tokens of each part. times: of each part. branches: names of its
    rows, each standing for a batch.
    """

    first: int
    sizes: tuple[int, ...]
    times: tuple[float, ...]
    branches: tuple[str, ...]


class PartEngine:
    """What is evaluated when: which finished parts still have to be written, and for which rows."""

    def __init__(self, model: XAR) -> None:
        self.entities = model.entities
        self.dtype = model.dtype
        self._finished: list[Tensor] = []
        self._written = dict.fromkeys(BRANCHES, 0)  # parts whose final keys and values stand, by branch

    def velocities(
        self, first: int, states: Sequence[Tensor], times: Sequence[float], branches: Sequence[str]
    ) -> list[Tensor]:
        """The velocities of all parts in flight.

        Args:
            first: the number of the first one; all before it are finished.
            states: of each part in flight (B, its tokens, C·patch²), of any floating type.
            times: of each, in [0, 1].
            branches: ("cond",), ("uncond",), or ("cond", "uncond").

        Returns:
            Of each part (len(branches)·B, its tokens, C·patch²), in the order of `branches`, in the model's type.

        Raises:
            ValueError: parts that do not follow those that are finished, another number of times than of states, or
                branches that are not those above.
        """
        if first != len(self._finished):
            raise ValueError(f"first must be the number of finished parts, {len(self._finished)}, got {first}")
        if not 1 <= len(states) <= self.entities.count - first:
            raise ValueError(f"states must be of 1 to {self.entities.count - first} parts, got {len(states)}")
        if len(times) != len(states):
            raise ValueError(f"times must be as many as states, {len(states)}, got {len(times)}")
        branches = tuple(branches)
        if not branches or branches not in (BRANCHES, BRANCHES[:1], BRANCHES[1:]):
            raise ValueError(f"branches must be ('cond',), ('uncond',) or both in this order, got {branches}")
        begin = max(self._written[branch] for branch in branches)
        for branch in branches:  # one that was left out for some parts catches up by itself
            self._evaluate(self._written[branch], self._finished[self._written[branch] : begin], [], [], (branch,))
        return self._evaluate(begin, self._finished[begin:], states, times, branches)

    def finish(self, part: int, state: Tensor) -> None:
        """Say that a part is done.

        Args:
            part: its number; all before it are finished.
            state: (B, its tokens, C·patch²), as the image will have it.

        Raises:
            ValueError: another part is next.
        """
        if part != len(self._finished):
            raise ValueError(f"part must be the next one to be finished, {len(self._finished)}, got {part}")
        self._finished.append(state.to(self.dtype))

    def _evaluate(
        self,
        first: int,
        finished: Sequence[Tensor],
        states: Sequence[Tensor],
        times: Sequence[float],
        branches: tuple[str, ...],
    ) -> list[Tensor]:
        if not finished and not states:
            return []
        parts = [*finished, *states]
        sizes = self.entities.sizes[first : first + len(parts)]
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            if part.dim() != 3 or part.shape[1] != size:
                shape = tuple(part.shape)
                raise ValueError(f"the state of part {first + number} must be (batch, {size}, values), got {shape}")
        evaluation = Evaluation(first, tuple(sizes), (*[0.0] * len(finished), *times), branches)
        velocities = self._run(evaluation, parts)
        self._written.update(dict.fromkeys(branches, first + len(finished)))
        return velocities[len(finished) :]

    def _run(self, evaluation: Evaluation, parts: Sequence[Tensor]) -> list[Tensor]:
        """The velocity of each part (len(branches)·B, its tokens, values)."""
        raise NotImplementedError


class PartSampler(PartEngine):
    """The engine of one batch of images.

    Args:
        model: in eval mode, of any floating type, on any device.
        condition: classes (B,) int64.
        null: the class that stands for none; None without guidance.
        times: all at which it will be called; the modulations at others are computed when they are.
        table_bytes: memory for modulations made ahead; where they need more, each evaluation computes its own.
        replays: evaluations of earlier batches as CUDA graphs; None for none.

    Raises:
        ValueError: a model in training mode.
    """

    def __init__(
        self,
        model: XAR,
        condition: Tensor,
        null: Tensor | int | None = None,
        times: Sequence[float] = (),
        table_bytes: int = TABLE_BYTES,
        replays: Replays | None = None,
    ) -> None:
        super().__init__(model)
        if model.training:
            raise ValueError("model must be in eval mode, got training mode, which drops features; call model.eval()")
        self.model = model
        self.batch = len(condition)
        self.device = condition.device
        labels = condition if null is None else torch.cat([condition, _filled(condition, null)])
        self.modulations = Modulations(model, labels, times, table_bytes)
        self.replays = replays
        self._cos_sin = _rotations(model, self.device)
        self._owners: dict[tuple[int, ...], Tensor] = {}
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def rows(self) -> int:
        """Of the buffers."""
        return len(self.modulations.labels)

    @property
    def buffers(self) -> list[Tensor]:
        """Keys and values, once there are some."""
        return [buffer for buffer in (self._keys, self._values) if buffer is not None]

    @property
    def cache_bytes(self) -> int:
        """What the keys and values take, once there are some."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @torch.no_grad()
    def _run(self, evaluation: Evaluation, parts: Sequence[Tensor]) -> list[Tensor]:
        branches = len(evaluation.branches)
        begin = 0 if evaluation.branches[0] == "cond" else self.batch
        rows = slice(begin, begin + branches * self.batch)
        if rows.stop > self.rows:
            raise ValueError("null must be the null class for rows without a condition, got None")
        tokens = torch.cat([part.to(self.dtype) for part in parts], dim=1)
        tokens = tokens.repeat(branches, 1, 1)
        modulations = self.modulations.at(evaluation.times, rows)
        self._prepare(evaluation.sizes)
        network = self._network if self.replays is None else self.replays.network(self)
        velocities = network(tokens, modulations, evaluation, rows)
        return list(velocities.split(evaluation.sizes, dim=1))

    def _network(self, tokens: Tensor, modulations: Tensor, evaluation: Evaluation, rows: slice) -> Tensor:
        """Tokens (rows, n, values) and modulations (blocks, rows, parts, 6, width) to velocities as the tokens."""
        model, first = self.model, self.entities.bounds[evaluation.first][0]
        encoder_depth = len(model.encoder_blocks)
        x = model.embed(tokens, first)
        for index, block in enumerate(model.blocks):
            if index == encoder_depth:
                x = model.enter_decoder(x, first)
            x = self._block(index, block, x, modulations[index], evaluation, rows)
        return model.finish(x)

    def _block(
        self, index: int, block: XARBlock, x: Tensor, modulation: Tensor, evaluation: Evaluation, rows: slice
    ) -> Tensor:
        sizes, shape = evaluation.sizes, x.shape
        if len(set(sizes)) == 1:  # tokens that share a modulation side by side
            x = x.unflatten(1, (len(sizes), sizes[0]))
            modulation = modulation.unsqueeze(2)
        else:
            x = x.unsqueeze(1)
            modulation = modulation.index_select(1, self._owners[sizes]).unsqueeze(1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(-2)
        branch = self._attention(index, block, _modulated(x, scale1, shift1).view(shape), evaluation, rows)
        x = torch.addcmul(x, gate1, branch.view(x.shape))
        branch = block.mlp(_modulated(x, scale2, shift2).view(shape))
        return torch.addcmul(x, gate2, branch.view(x.shape)).view(shape)

    def _attention(self, index: int, block: XARBlock, x: Tensor, evaluation: Evaluation, rows: slice) -> Tensor:
        attn, bounds = block.attn, self.entities.bounds
        batch, length, width = x.shape
        heads = attn.num_heads
        begin, first = bounds[evaluation.first][0], evaluation.first
        end = begin + length
        qkv = attn.qkv(x).view(batch, length, 3, heads, width // heads)
        keys, values = self._buffers()
        q, k, v = qkv.unbind(2)
        rotations = self._cos_sin[begin:end]
        _rotate(k, rotations, keys[index, rows, begin:end])
        values[index, rows, begin:end] = v
        q = _rotate(q, rotations, torch.empty_like(q)).transpose(1, 2)
        keys, values = keys[index, rows].transpose(1, 2), values[index, rows].transpose(1, 2)
        outputs = [
            attn.sdpa(q[:, :, lo - begin : hi - begin], keys[:, :, :hi], values[:, :, :hi])
            for lo, hi in bounds[first : first + len(evaluation.sizes)]
        ]
        return attn.finish(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2))

    def _prepare(self, sizes: tuple[int, ...]) -> None:
        """Make what an evaluation reads and must not make itself, as none may be made while a graph is captured."""
        if len(set(sizes)) > 1 and sizes not in self._owners:
            counts = torch.tensor(sizes)
            self._owners[sizes] = torch.arange(len(sizes)).repeat_interleave(counts).to(self.device)
        self._buffers()

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values (blocks, rows, places, heads, head dim) of the type that the projections have."""
        if self._keys is None or self._values is None:
            model, kind = self.model, self.device.type
            width = model.z_proj.out_features
            shape = (len(model.blocks), self.rows, self.entities.total, model.heads, width // model.heads)
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
            make = torch.empty if self.replays is None else self.replays.empty
            self._keys, self._values = (make(shape, dtype=dtype, device=self.device) for _ in range(2))
        return self._keys, self._values


class Replays:
    """Evaluations as CUDA graphs, one for each range of parts, with the keys and values that they read and write.

    An evaluation of a batch of the same size is replayed, whatever the batch. Seven graphs serve a run of four cells:
    the first evaluation of each but the first takes the finished cell along.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, list[Tensor]] = {}
        self._networks: dict[tuple, Graphed] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer that no sampler of the present batch has; those of earlier batches are used again."""
        free = self._buffers.setdefault((shape, dtype, device), [])
        return free.pop(0) if free else torch.empty(shape, dtype=dtype, device=device)

    def release(self, sampler: PartSampler) -> None:
        """Take back the buffers of a sampler whose batch is done; graphs keep the sampler, without the batch."""
        sampler.modulations.table = None
        for buffer in sampler.buffers:
            self._buffers[tuple(buffer.shape), buffer.dtype, buffer.device].append(buffer)

    def network(self, sampler: PartSampler) -> Callable[..., Tensor]:
        """`PartSampler._network`, replayed."""

        def replayed(tokens: Tensor, modulations: Tensor, evaluation: Evaluation, rows: slice) -> Tensor:
            places = tuple(buffer.data_ptr() for buffer in sampler.buffers)
            key = (*places, evaluation.first, evaluation.sizes, rows.start, rows.stop)
            if key not in self._networks:
                run = partial(sampler._network, evaluation=evaluation, rows=rows)
                self._networks[key] = Graphed(run)
            return self._networks[key](tokens, modulations)

        return replayed


# The norm and the rotation as `haste.models.xar` has them, but in place, which gradients would not survive.


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """RMS(x) ⊙ scale + shift, the norm in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1])
    return torch.addcmul(shift, x * mean_square.add_(1e-6).rsqrt_().to(x.dtype), scale)


def _rotations(model: XAR, device: torch.device) -> Tensor:
    """cos + i·sin (N, 1, head dim / 2)."""
    return torch.complex(*model.rotary(model.dtype, device))[:, None]


def _rotate(x: Tensor, rotations: Tensor, out: Tensor) -> Tensor:
    """Rotate the pairs of channels of x (B, n, H, D) into `out`, in at least float32."""
    wide = rotations.real.dtype
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    if out.dtype == wide:
        torch.mul(pairs, rotations, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
    else:
        out.copy_(torch.view_as_real(pairs * rotations).flatten(-2))
    return out


def _filled(condition: Tensor, null: Tensor | int) -> Tensor:
    return torch.as_tensor(null).to(condition).expand_as(condition)


# ---- a batch of images ----


def guidance_scales(count: int) -> list[float]:
    """Of so many parts: none for the first, all for the last, linear between them."""
    return [k / (count - 1) for k in range(count)] if count > 1 else [1.0]


def sample_parts(model: XAR, noise: Tensor, condition: Tensor, solve: Solver, cache: PartCache | None = None) -> Tensor:
    """The images that a solver makes of noise, part by part or staggered.

    Args:
        model: in eval mode.
        noise: (B, C, S, S), or the sequence (B, N, C·patch²), which scales need.
        condition: classes (B,) int64.
        solve: the sampler with its settings.
        cache: forecasts some of the velocities.

    Returns:
        (B, C, S, S), in the type of noise.

    Raises:
        ValueError: noise of another shape, images of noise for scales, whose entities hold more; classes that the model
            has not.
    """
    entities = model.entities
    if solve.stagger is not None and model.context == "clean":
        logger.warning("the model was trained with clean entities before each, and staggered ones are noisy")
    tokens = _as_sequences(model, noise)
    _check_classes(model, "condition", condition)
    scales = guidance_scales(entities.count)
    null = solve.null if any(guidance.scale != 1 for guidance in solve.guidance_of(scales)) else None
    if null is not None:
        _check_classes(model, "null", torch.as_tensor(null).reshape(1))
    engine = PartSampler(model, condition, null, solve.times(scales), replays=model.replays)
    try:
        parts = solve.parts(engine, tokens.split(entities.sizes, dim=1), scales, cache)
    finally:
        if model.replays is not None:
            model.replays.release(engine)
    return entities.join(torch.cat([part.to(noise.dtype) for part in parts], dim=1))


def _as_sequences(model: XAR, noise: Tensor) -> Tensor:
    """Noise, of images or of sequences, as (B, N, values)."""
    entities, values = model.entities, model.z_proj.in_features
    side = entities.grid * entities.patch_size
    image, sequence = (model.channels, side, side), (entities.total, values)
    shape, of_scales = tuple(noise.shape[1:]), entities.prefix > 0
    if shape == sequence or (shape == image and not of_scales):
        return noise if shape == sequence else entities.split(noise)
    wanted = " or ".join(
        f"(batch, {', '.join(map(str, sizes))})" for sizes in ([] if of_scales else [image]) + [sequence]
    )
    raise ValueError(f"noise must have shape {wanted} for entities of kind {entities.kind}, got {tuple(noise.shape)}")


def _check_classes(model: XAR, name: str, classes: Tensor) -> None:
    rows = model.class_emb.num_embeddings
    if classes.dim() != 1 or classes.is_floating_point():
        raise ValueError(f"{name} must be classes (batch,) of an integer type, got {classes.dtype} of shape "
                         f"{tuple(classes.shape)}")  # fmt: skip
    if classes.numel() and not 0 <= classes.min() <= classes.max() < rows:
        raise ValueError(f"{name} must be classes from 0 to {rows - 1}, got {classes.min()} to {classes.max()}")
