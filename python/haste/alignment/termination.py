"""When alignment ends, and its weight until then.

The trainer calls, before each step:

    if rule.wants_probe(step):
        rule.observe(step, rule.measure(model, aligner, batches))
    if rule.due(step):
        rule.stopped_at = step  # and frees the teachers; alignment does not start again
    loss = L_v + rule.weight(step) * (proj_coeff * L_R + attn_coeff * L_A)

All probes use the same images, noise and times. They do not change the random state, the gradients or the mode of the
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from haste.alignment.aligner import Aligner, LayerMap
from haste.errors import UserError
from haste.models import get_family

ProbeBatch = tuple[Tensor, Tensor, Tensor]
"""Inputs of the model (B, C, S, S), images for the teachers (B, C, R, R), conditions (B, ...)."""

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes."""

NOISE_SEED = 0


# ---- measurements ----


def _of_one_process(tensor: Tensor) -> Tensor:
    return tensor


def gradient_cosine(
    model: nn.Module,
    aligner: Aligner,
    batches: Iterable[ProbeBatch],
    block: int,
    times: Sequence[float],
    path_type: str = "linear",
    reduce: Reduce = _of_one_process,
) -> float:
    """The cosine between the gradients of proj_coeff·L_R + attn_coeff·L_A and of L_v, in the parameters of one block.

    It is the automatic trigger of HASTE (arXiv 2505.16792, appendix A.2). Each gradient is that of the mean over all
    images at one time, whatever the batch size; the cosines are averaged over the times.

    Args:
        model: without a wrapper that shards or synchronizes it.
        batches: this process's images.
        block: counted from 0, at most the last one that a loss of the aligner reads, else it has no gradient.
    """
    parameters = [p for p in get_family(model).blocks(model)[block].parameters() if p.requires_grad]
    totals = [torch.zeros((), device=parameters[0].device)] * len(times)  # become (2, number of parameters)
    with _probing(model):
        for index, images, alignment, velocity in _probe_losses(model, aligner, batches, times, path_type):
            gradients = torch.stack([_gradient(alignment, parameters), _gradient(velocity, parameters)])
            totals[index] = totals[index] + images * gradients
    cosines = [torch.cosine_similarity(*reduce(total).double(), dim=0) for total in totals]
    return torch.stack(cosines).mean().item()


@torch.no_grad()
def mean_alignment_loss(
    model: nn.Module,
    aligner: Aligner,
    batches: Iterable[ProbeBatch],
    times: Sequence[float],
    path_type: str = "linear",
    reduce: Reduce = _of_one_process,
) -> float:
    """The mean over images and times of proj_coeff·L_R + attn_coeff·L_A.

    Args:
        batches: this process's images.
    """
    total = torch.zeros(2)  # the sum of the losses and their number
    with _probing(model):
        for _, images, loss, _ in _probe_losses(model, aligner, batches, times, path_type):
            total = total.to(loss.device) + images * torch.stack([loss, torch.ones_like(loss)])
    loss, number = reduce(total).tolist()
    return loss / number


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Eval mode, so that no label is dropped, in the weights' type: in fp16, gradients without a scaler underflow."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.train(training)


def _probe_losses(
    model: nn.Module, aligner: Aligner, batches: Iterable[ProbeBatch], times: Sequence[float], path_type: str
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """The index of the time, the number of images, alignment loss and velocity loss, for each batch at each time."""
    family = get_family(model)
    generator = torch.Generator().manual_seed(NOISE_SEED)  # of the CPU: the same noise on every device
    for x, images, condition in batches:
        outputs = aligner.teacher_outputs(images)
        x = aligner.with_class_token(x, outputs)
        noise = torch.randn(family.noise_shape(model, x), generator=generator).to(x.device)
        for index, time in enumerate(times):
            t = torch.full((len(x),), family.time(time), device=x.device)
            x_t, target = family.interpolate(model, x, noise, t, path_type)
            output = model(x_t, t, family.condition(condition), aligner.student_layers, aligner.project)
            losses = aligner.losses_of(output, outputs)
            yield index, len(x), aligner.weigh(losses), family.loss(output.prediction, target)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient as one float32 vector, 0 where the loss does not depend on a parameter; the graph stays."""
    # L_A reaches only the queries and keys of the last block that it reads.
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten().float() for gradient in gradients])


# ---- rules ----

NEVER = -1


@dataclass
class Termination:
    """HASTE's rule (arXiv 2505.16792): alignment has full weight while step < τ. Also the base of the other rules.

    Args:
        early_stop_point: τ, or -1 for never.

    Attributes:
        stopped_at: the step before which alignment ended, set by the trainer; None while it lasts.
    """

    early_stop_point: int
    stopped_at: int | None = field(default=None, init=False)

    def weight(self, step: int) -> float:
        """The factor of both alignment losses in this step, above 0 until `due`."""
        return 1.0

    def due(self, step: int) -> bool:
        """Whether alignment must end before this step, counted from 0."""
        return self.stopped_at is None and self.early_stop_point != NEVER and step >= self.early_stop_point

    def wants_probe(self, step: int) -> bool:
        """Whether `measure` and `observe` must be called before this step."""
        return False

    def measure(
        self, model: nn.Module, aligner: Aligner, batches: Iterable[ProbeBatch], reduce: Reduce = _of_one_process
    ) -> float:
        """Measure the value for `observe`.

        Args:
            batches: this process's images. Computed in fp32, so half the size of a half-precision step's is safe.
        """
        raise NotImplementedError

    def observe(self, step: int, value: float) -> None:
        """Record a measurement."""
        raise NotImplementedError

    @property
    def plan(self) -> str:
        """When alignment will end, for the log."""
        return "to the end" if self.early_stop_point == NEVER else f"until step {self.early_stop_point}"

    @property
    def reason(self) -> str:
        """Why alignment ends, for the log."""
        return f"--early-stop-point is {self.early_stop_point}"

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped_at = state["stopped_at"]


@dataclass
class CosineRamp(Termination):
    """The weight falls from 1 before `ramp_start` to 0 at τ along half a cosine: ½(1 + cos π·progress)."""

    ramp_start: int

    def weight(self, step: int) -> float:
        left = (self.early_stop_point - step) / (self.early_stop_point - self.ramp_start)
        # The same half cosine, written so that the last steps before τ do not round to 0.
        return math.sin(0.5 * math.pi * min(1.0, left)) ** 2

    @property
    def plan(self) -> str:
        return f"with weights that fall from step {self.ramp_start} to 0 at step {self.early_stop_point}"


@dataclass
class ProbedTermination(Termination):
    """A rule that measures every `every` steps from step `start` on. The measurements are saved in checkpoints."""

    TIMES: ClassVar = (0.02, 0.1, 0.5, 0.8)  # at which the probe images are noised
    start: int
    every: int
    path_type: str
    observed: list[tuple[int, float]] = field(default_factory=list, init=False)

    def triggered(self) -> bool:
        """Whether the measurements call for the end."""
        raise NotImplementedError

    def finding(self) -> str:
        """The measurement that triggered the end, for the log."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        return super().due(step) or (self.stopped_at is None and self.triggered())

    def wants_probe(self, step: int) -> bool:
        on_schedule = step >= self.start and (step - self.start) % self.every == 0
        seen = bool(self.observed) and self.observed[-1][0] == step
        return on_schedule and not seen and self.stopped_at is None and not self.due(step)

    def observe(self, step: int, value: float) -> None:
        self.observed.append((step, value))

    @property
    def reason(self) -> str:
        return self.finding() if self.triggered() else super().reason

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "observed": list(self.observed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.observed = [(step, value) for step, value in state.get("observed", [])]


@dataclass
class GradientCosine(ProbedTermination):
    """HASTE's automatic trigger (appendix A.2): the gradients of alignment and of L_v at one block oppose each other.

    Args:
        block: counted from 0.
        threshold: alignment ends when the mean cosine is below it.
    """

    block: int
    threshold: float

    def measure(
        self, model: nn.Module, aligner: Aligner, batches: Iterable[ProbeBatch], reduce: Reduce = _of_one_process
    ) -> float:
        return gradient_cosine(model, aligner, batches, self.block, self.TIMES, self.path_type, reduce)

    def triggered(self) -> bool:
        return bool(self.observed) and self.observed[-1][1] < self.threshold

    @property
    def plan(self) -> str:
        return f"until the gradients' cosine is below {self.threshold}, or {super().plan}"

    def finding(self) -> str:
        value = self.observed[-1][1]
        return f"the gradients of alignment and of the loss without it have cosine {value:.4f}, below {self.threshold}"


@dataclass
class Plateau(ProbedTermination):
    """The alignment loss of the probe images has not fallen for `patience` probes.

    Args:
        min_delta: a loss has fallen if it is below the lowest one before it by more than this.
    """

    patience: int
    min_delta: float

    def measure(
        self, model: nn.Module, aligner: Aligner, batches: Iterable[ProbeBatch], reduce: Reduce = _of_one_process
    ) -> float:
        return mean_alignment_loss(model, aligner, batches, self.TIMES, self.path_type, reduce)

    def triggered(self) -> bool:
        return self._lowest()[1] >= self.patience

    @property
    def plan(self) -> str:
        return f"until its loss has not fallen for {self.patience} probes, or {super().plan}"

    def finding(self) -> str:
        lowest, since = self._lowest()
        return f"the alignment loss is not below {lowest:.4f} by more than {self.min_delta} after {since} more probes"

    def _lowest(self) -> tuple[float, int]:
        """The lowest loss, and the number of probes since."""
        lowest, since = math.inf, 0
        for _, value in self.observed:
            if value < lowest - self.min_delta:
                lowest, since = value, 0
            else:
                since += 1
        return lowest, since


def make_termination(config: Any) -> Termination:
    """The rule that --termination names.

    Args:
        config: a resolved TrainConfig.

    Raises:
        UserError: settings with which the rule cannot work.
    """
    if not config.aligns_features and not config.aligns_attention and not config.sra_coeff:
        return Termination(NEVER)
    if config.sra_coeff and config.termination in ("gradient-cosine", "plateau"):
        raise UserError("--termination must be fixed or cosine-ramp with --sra-coeff, whose loss is not probed, got "
                        f"{config.termination}")  # fmt: skip
    tau = config.early_stop_point
    if config.termination == "fixed":
        return Termination(tau)
    if config.termination == "cosine-ramp":
        if tau == NEVER:
            raise UserError("--early-stop-point must be a step with --termination cosine-ramp, got -1")
        if not 0 <= config.ramp_start < tau:
            raise UserError(
                f"--ramp-start must be at least 0 and below --early-stop-point, {tau}, got {config.ramp_start}"
            )
        return CosineRamp(tau, config.ramp_start)
    schedule = (tau, config.probe_start, config.probe_every, config.path_type)
    if config.termination == "plateau":
        return Plateau(*schedule, patience=config.plateau_patience, min_delta=config.plateau_min_delta)
    # The last block, counted from 1, that each alignment loss reads: the features' first.
    blocks = [config.encoder_depth] if config.aligns_features else []
    if config.aligns_attention:
        blocks.append(1 + max(LayerMap.parse(config.layer_map).student))
    if config.probe_block > max(blocks):
        raise UserError(
            f"--probe-block must be 1 to {max(blocks)}, the last block that alignment reads, or 0, "
            f"got {config.probe_block}"
        )
    block = config.probe_block or blocks[0]
    return GradientCosine(*schedule, block=block - 1, threshold=config.probe_threshold)
