"""When alignment ends, and how strong it is until then. Once it has ended it never comes back.

The trainer calls, before each step:

    if rule.wants_probe(step):
        rule.observe(step, rule.measure(model, aligner, batches))
    if rule.due(step):
        rule.stopped_at = step  # and frees the teachers
    loss = L_v + rule.weight(step) * (proj_coeff * L_R + attn_coeff * L_A)

What a rule measures, it measures on images, noise and times that are the same at every probe, and without touching the
random state, the gradients or the mode of the run that is being probed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from haste.alignment.aligner import Aligner, LayerMap
from haste.errors import UserError
from haste.models import get_family
from haste.transport import velocity_loss

ProbeBatch = tuple[Tensor, Tensor, Tensor]
"""What is diffused (B, C, S, S), the images for the teachers (B, C, R, R), the labels (B,)."""

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes."""

NOISE_SEED = 0


def _of_one_process(tensor: Tensor) -> Tensor:
    """The sum over one process."""
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

    The automatic trigger of HASTE (arXiv 2505.16792, appendix A.2).

    A gradient is that of the mean over all images at one time, so the size of the batches does not matter; the
    cosines are averaged over the times. Of several processes, each brings its own images.

    model: the plain module, not a wrapper that shards or synchronises it.
    block: counted from 0, not beyond the last that a loss of the aligner looks at: it would have no gradient.
    """
    family = get_family(model)
    parameters = [p for p in family.blocks(model)[block].parameters() if p.requires_grad]
    totals = [torch.zeros((), device=parameters[0].device)] * len(times)  # become (2, number of parameters)
    with _probing(model, parameters[0].device):
        for x, images, labels, noise in _with_noise(batches):
            targets = aligner.teacher_outputs(images)
            for index, time in enumerate(times):
                t = torch.full((len(x),), time, device=x.device)
                x_t, target = family.interpolate(model, x, noise, t, path_type)
                output = model(x_t, t, family.condition(labels), aligner.student_layers, aligner.project)
                losses = aligner.losses(output.queries_keys, output.projections, targets, output.prefix)
                alignment = _gradient(aligner.weigh(losses), parameters)
                velocity = _gradient(velocity_loss(output.velocity, target), parameters)
                totals[index] = totals[index] + len(x) * torch.stack([alignment, velocity])
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
    """The mean over images and times of proj_coeff·L_R + attn_coeff·L_A. Of several processes, each brings its own
    images."""
    family = get_family(model)
    total = torch.zeros(2)  # the sum of the losses and their number
    with _probing(model, next(model.parameters()).device):
        for x, images, labels, noise in _with_noise(batches):
            targets = aligner.teacher_outputs(images)
            for time in times:
                t = torch.full((len(x),), time, device=x.device)
                x_t, _ = family.interpolate(model, x, noise, t, path_type)
                output = model(x_t, t, family.condition(labels), aligner.student_layers, aligner.project)
                losses = aligner.losses(output.queries_keys, output.projections, targets, output.prefix)
                loss = aligner.weigh(losses)
                total = total.to(loss.device) + len(x) * torch.stack([loss, torch.ones_like(loss)])
    loss, number = reduce(total).tolist()
    return loss / number


@contextmanager
def _probing(model: nn.Module, device: torch.device) -> Iterator[None]:
    """No label is dropped in the meantime, and everything is computed in the type of the weights: gradients that no
    scaler has lifted would vanish in fp16."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        model.train(training)


def _with_noise(batches: Iterable[ProbeBatch]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each batch with noise of its own, made on the CPU: the same at every probe and on every device."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    for x, images, labels in batches:
        yield x, images, labels, torch.randn(x.shape, generator=generator).to(x.device)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient as one float32 vector, 0 where the loss does not depend on a parameter; the graph stays."""
    # L_A reaches only the queries and keys of the last block that it looks at.
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten().float() for gradient in gradients])


NEVER = -1
RULES = ("fixed", "cosine-ramp", "gradient-cosine", "plateau")


class Termination:
    """HASTE's default rule (arXiv 2505.16792): alignment holds with full weight while step < τ.

    It is also the base of the other rules: with them, τ is the step at which alignment ends at the latest.

    early_stop_point: τ, or -1 for never.
    stopped_at: the step before which alignment ended; None while it has not. The trainer sets it.
    """

    def __init__(self, early_stop_point: int) -> None:
        self.early_stop_point = early_stop_point
        self.stopped_at: int | None = None

    def weight(self, step: int) -> float:
        """What both alignment losses are multiplied by in this step; above 0 wherever due() has not been true."""
        return 1.0

    def due(self, step: int) -> bool:
        """Whether alignment must end before the step with this number, counted from 0."""
        return self.stopped_at is None and self.early_stop_point != NEVER and step >= self.early_stop_point

    def wants_probe(self, step: int) -> bool:
        """Whether something must be measured, and given to observe(), before this step."""
        return False

    def measure(
        self, model: nn.Module, aligner: Aligner, batches: Iterable[ProbeBatch], reduce: Reduce = _of_one_process
    ) -> float:
        """What observe() is given, from images that are the same at every probe.

        The run's random state is left alone. reduce: the sum over processes, each of which brings its own
        images. It computes in fp32, so batches should be half as large as in a half-precision step.
        """
        raise RuntimeError(f"{type(self).__name__} measures nothing")

    def observe(self, step: int, value: float) -> None:
        raise RuntimeError(f"{type(self).__name__} measures nothing")

    @property
    def plan(self) -> str:
        """When alignment is to end, in a few words."""
        return "to the end" if self.early_stop_point == NEVER else f"until step {self.early_stop_point}"

    @property
    def reason(self) -> str:
        """Why alignment ends, in a few words."""
        return f"--early-stop-point is {self.early_stop_point}"

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped_at = state["stopped_at"]


class CosineRamp(Termination):
    """The weight falls from 1 before `ramp_start` to 0 at τ along half a cosine: ½(1 + cos π·progress)."""

    def __init__(self, early_stop_point: int, ramp_start: int) -> None:
        super().__init__(early_stop_point)
        self.ramp_start = ramp_start

    def weight(self, step: int) -> float:
        left = (self.early_stop_point - step) / (self.early_stop_point - self.ramp_start)
        # The same half cosine, written so that the last steps before τ do not round to 0.
        return math.sin(0.5 * math.pi * min(1.0, left)) ** 2

    @property
    def plan(self) -> str:
        return f"with weights that fall from step {self.ramp_start} to 0 at step {self.early_stop_point}"


class ProbedTermination(Termination):
    """A rule that looks at a measurement every `every` steps from step `start` on.

    What was measured is part of the state, so that a resumed run decides as an unbroken one.
    TIMES: at which the probe images are noised.
    """

    TIMES = (0.02, 0.1, 0.5, 0.8)

    def __init__(self, early_stop_point: int, start: int, every: int, path_type: str) -> None:
        super().__init__(early_stop_point)
        self.start = start
        self.every = every
        self.path_type = path_type
        self.observed: list[tuple[int, float]] = []

    def triggered(self) -> bool:
        """Whether what was observed calls for the end."""
        raise NotImplementedError

    def finding(self) -> str:
        """What was observed, once triggered."""
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


class GradientCosine(ProbedTermination):
    """HASTE's automatic trigger (appendix A.2): at one block the gradients of all alignment and of L_v point apart.

    block: whose parameters' gradients are compared, counted from 0.
    threshold: alignment ends when the mean cosine is below it.
    """

    def __init__(
        self, early_stop_point: int, start: int, every: int, path_type: str, block: int, threshold: float
    ) -> None:
        super().__init__(early_stop_point, start, every, path_type)
        self.block = block
        self.threshold = threshold

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
        return f"the gradients of alignment and velocity have cosine {value:.4f}, below {self.threshold}"


class Plateau(ProbedTermination):
    """The mean alignment loss of the probe images has not fallen for `patience` probes.

    min_delta: by less than this, a loss counts as not fallen below the lowest one before it.
    """

    def __init__(
        self, early_stop_point: int, start: int, every: int, path_type: str, patience: int, min_delta: float
    ) -> None:
        super().__init__(early_stop_point, start, every, path_type)
        self.patience = patience
        self.min_delta = min_delta

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
        """The lowest loss, and how many probes have come since."""
        lowest, since = math.inf, 0
        for _, value in self.observed:
            if value < lowest - self.min_delta:
                lowest, since = value, 0
            else:
                since += 1
        return lowest, since


def make_termination(config: Any) -> Termination:
    """The rule that --termination names, of a TrainConfig that is resolved.

    Raises:
        UserError: settings with which it cannot work.
    """
    if not config.teachers:
        return Termination(NEVER)
    tau = config.early_stop_point
    if config.termination == "fixed":
        return Termination(tau)
    if config.termination == "cosine-ramp":
        if tau == NEVER:
            raise UserError("--early-stop-point must be a step, at which --termination cosine-ramp is at 0, got -1")
        if not 0 <= config.ramp_start < tau:
            raise UserError(
                f"--ramp-start must be at least 0 and below --early-stop-point, {tau}, got {config.ramp_start}"
            )
        return CosineRamp(tau, config.ramp_start)
    schedule = (tau, config.probe_start, config.probe_every, config.path_type)
    if config.termination == "gradient-cosine":
        blocks = aligned_blocks(config)
        if config.probe_block > max(blocks):
            raise UserError(
                f"--probe-block must be 1 to {max(blocks)}, the last block that alignment reaches, or 0, "
                f"got {config.probe_block}"
            )
        block = config.probe_block or blocks[0]
        return GradientCosine(*schedule, block=block - 1, threshold=config.probe_threshold)
    if config.termination == "plateau":
        return Plateau(*schedule, patience=config.plateau_patience, min_delta=config.plateau_min_delta)
    raise UserError(f"--termination must be {', '.join(RULES)}, got {config.termination!r}")


def aligned_blocks(config: Any) -> list[int]:
    """The last block, counted from 1, that each alignment loss reads: that of features first."""
    blocks = [config.encoder_depth] if config.aligns_features else []
    return blocks + [1 + max(LayerMap.parse(config.layer_map).student)] if config.aligns_attention else blocks
