"""Alignment's own parts of a step, timed by themselves: their forward, and their share of the backward.

Beside a whole step they are too small to be told by subtraction. Each part works on what the step would give it, and
where the step adds its gradients to those of attention or of the next block, they are added here too. Both losses are
timed in eager code as well, on the same operands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from eager import attention_loss, feature_loss, teacher_map
from haste.alignment import alignment_losses
from torch import Tensor
from variants import Contender

Call = Callable[[], tuple[()]]


def make_parts(haste: Contender) -> dict[str, Call]:
    """By name, one call per part of the HASTE contender's alignment."""
    case, batch, aligner = haste.case, haste.batch, haste.aligner
    with torch.no_grad(), case.autocast():
        t = torch.rand(case.batch, device=case.device)
        output = haste.model(batch.latents, t, batch.condition, aligner.student_layers, aligner.project)
    pairs = [(leaf(q), leaf(k)) for q, k in output.queries_keys]
    projections = [leaf(z) for z in output.projections]
    return {
        "L_A: attention maps": loss_call(haste, pairs, [], aligner.attn_coeff, output.prefix),
        "L_R: cosine": loss_call(haste, [], projections, aligner.proj_coeff),
        "L_R: projector, with its AdamW": projector_call(haste, torch.randn_like(projections[0])),
        "eager L_A, its maps in memory": eager_attention_call(haste, pairs, output.prefix),
        "eager L_R: cosine": eager_feature_call(haste, projections),
    }


def leaf(x: Tensor) -> Tensor:
    """The same numbers in the same place, as the beginning of a graph."""
    return x.detach().requires_grad_()


def loss_call(
    haste: Contender, pairs: list[tuple[Tensor, Tensor]], features: list[Tensor], weight: float, prefix: int = 0
) -> Call:
    """The one loss that is on: L_A with q and k, in which `prefix` tokens of a text come first, L_R with projected
    features."""
    (teacher,) = haste.aligner.teachers

    def loss() -> Tensor:
        attention, feature, _ = alignment_losses(pairs, features, [teacher.said], prefix=prefix)
        return weight * (feature if attention is None else attention)

    return gradients_call(haste, loss, pairs, features)


def eager_attention_call(haste: Contender, pairs: list[tuple[Tensor, Tensor]], prefix: int) -> Call:
    (teacher,) = haste.aligner.teachers

    def loss() -> Tensor:
        maps = [teacher_map(q, k, teacher.said.prefix) for q, k in teacher.said.queries_keys]
        logits = [q[:, :, prefix:] @ k[:, :, prefix:].mT * q.shape[-1] ** -0.5 for q, k in pairs]
        return haste.aligner.attn_coeff * attention_loss(logits, maps)

    return gradients_call(haste, loss, pairs, [])


def eager_feature_call(haste: Contender, features: list[Tensor]) -> Call:
    (teacher,) = haste.aligner.teachers
    return gradients_call(
        haste, lambda: haste.aligner.proj_coeff * feature_loss(features[0], teacher.said), [], features
    )


def gradients_call(
    haste: Contender, loss: Callable[[], Tensor], pairs: list[tuple[Tensor, Tensor]], features: list[Tensor]
) -> Call:
    """A loss of q and k or of features, and its gradients."""
    queries_keys = [x for pair in pairs for x in pair]
    others = [torch.zeros_like(x) for x in queries_keys]  # the gradients that attention itself has

    def call() -> tuple[()]:
        with haste.case.autocast():
            value = loss()
        gradients = torch.autograd.grad(value, queries_keys or features)
        if others:
            torch._foreach_add_(others, gradients)
        return ()

    return call


def projector_call(haste: Contender, upstream: Tensor) -> Call:
    """The three linear layers and their update; the gradient that comes from the cosine is handed in."""
    case, (projector,) = haste.case, haste.model.projectors
    tokens = leaf(torch.randn(case.batch, case.grid**2, projector[0].in_features, device=case.device))
    on_gpu = case.device == "cuda"  # there the call is timed in a CUDA graph
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-4, weight_decay=0.0, fused=True, capturable=on_gpu)
    optimizer.state.update({p: haste.optimizer.state[p] for p in projector.parameters()})

    def call() -> tuple[()]:
        with case.autocast():
            projection = projector(tokens)
        projection.backward(upstream)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ()

    return call
