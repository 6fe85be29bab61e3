"""What the termination rules measure, on pictures, noise and times that are the same at every probe.

Nothing here touches the random state, the gradients or the mode of the run that is being probed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from haste.alignment.aligner import Aligner
from haste.models.sit import SiT
from haste.transport import interpolate, velocity_loss

ProbeBatch = tuple[Tensor, Tensor, Tensor]
"""What is diffused (B, C, S, S), the pictures that the teachers look at (B, C, R, R), the labels (B,)."""

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes."""

NOISE_SEED = 0


def alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def gradient_cosine(
    model: SiT,
    aligner: Aligner,
    batches: Iterable[ProbeBatch],
    block: int,
    times: Sequence[float],
    path_type: str = "linear",
    reduce: Reduce = alone,
) -> float:
    """The cosine between the gradients of proj_coeff·L_R + attn_coeff·L_A and of L_v, in the parameters of one block.

    The automatic trigger of HASTE (arXiv 2505.16792, appendix A.2).

    A gradient is that of the mean over all pictures at one time, so the size of the batches does not matter; the
    cosines are averaged over the times. Of several processes, each brings its own pictures.

    model: the plain module, not a wrapper that shards or synchronises it.
    block: counted from 0, not beyond the last that a loss of the aligner looks at: it would have no gradient.
    """
    parameters = [p for p in model.blocks[block].parameters() if p.requires_grad]
    totals = [torch.zeros((), device=parameters[0].device)] * len(times)  # become (2, number of parameters)
    with _probing(model, parameters[0].device):
        for student, images, labels, noise in _with_noise(batches):
            lessons = aligner.ask(images)
            for index, time in enumerate(times):
                t = torch.full(labels.shape, time, device=student.device)
                x_t, target = interpolate(student, noise, t, path_type)
                output = model(x_t, t, labels, aligner.student_layers, aligner.project)
                alignment = _gradient(aligner.weigh(aligner.losses(output, lessons)), parameters)
                velocity = _gradient(velocity_loss(output.velocity, target), parameters)
                totals[index] = totals[index] + len(student) * torch.stack([alignment, velocity])
    cosines = [torch.cosine_similarity(*reduce(total).double(), dim=0) for total in totals]
    return torch.stack(cosines).mean().item()


@torch.no_grad()
def mean_alignment_loss(
    model: SiT,
    aligner: Aligner,
    batches: Iterable[ProbeBatch],
    times: Sequence[float],
    path_type: str = "linear",
    reduce: Reduce = alone,
) -> float:
    """The mean over pictures and times of proj_coeff·L_R + attn_coeff·L_A. Of several processes, each brings its own
    pictures."""
    total = torch.zeros(2)  # the sum of the losses and their number
    with _probing(model, next(model.parameters()).device):
        for student, images, labels, noise in _with_noise(batches):
            lessons = aligner.ask(images)
            for time in times:
                t = torch.full(labels.shape, time, device=student.device)
                x_t, _ = interpolate(student, noise, t, path_type)
                output = model(x_t, t, labels, aligner.student_layers, aligner.project)
                loss = aligner.weigh(aligner.losses(output, lessons))
                total = total.to(loss.device) + len(student) * torch.stack([loss, torch.ones_like(loss)])
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
    """Each batch with noise of its own, drawn on the CPU: the same at every probe and on every device."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    for student, images, labels in batches:
        yield student, images, labels, torch.randn(student.shape, generator=generator).to(student.device)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient as one float32 vector, 0 where the loss does not depend on a parameter; the graph stays."""
    # L_A reaches only the queries and keys of the last block that it looks at.
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten().float() for gradient in gradients])
