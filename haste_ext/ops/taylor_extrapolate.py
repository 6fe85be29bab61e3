"""taylor_extrapolate, ..._blocks and ..._steps: forecast cached features, one kernel for every forecaster."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_ext.ops.common import check_devices, check_same, check_tensor, refuse_gradient


def taylor_extrapolate(
    snapshots: Tensor, weights: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """residual + gate ⊙ Σ_k weights_k · snapshot_k, accumulated in float32.

    Every forecaster of cached features (Taylor as published, Newton, Hermite) is such a sum of the last full
    steps' raw features with weights that the host computes.

    Args:
        snapshots: (K, B, N, D), float32, float16, bfloat16 (float64 on the CPU); any strides.
        weights: (K,) float32 on the same device. A slot of weight 0 is not read, whatever it holds.
        residual: (B, N, D), of any of these types; 0 if None.
        gate: (B, D) of the snapshots' type, broadcast over the tokens; 1 if None.

    Returns:
        (B, N, D), of the residual's type if there is one, else of the snapshots'. No gradient: for inference.

    Raises:
        TypeError: an argument of another type than those above.
        ValueError: a shape or device that does not fit; the sentence names the argument.
        RuntimeError: a CUDA tensor in a build without CUDA.
        NotImplementedError: a gradient is asked for.

    Source: TaylorSeer, arXiv 2503.06923, whose T_i are linear in the last i + 1 full features.
    """
    check_tensor("snapshots", snapshots, 4, "(slots, batch, tokens, dim)")
    slots, batch, tokens, dim = snapshots.shape
    _check_weights(weights, snapshots, [(slots,)])
    _check_optional("residual", residual, snapshots, (batch, tokens, dim), same_type=False)
    _check_optional("gate", gate, snapshots, (batch, dim), same_type=True)
    return torch.ops.haste.taylor_extrapolate(snapshots, weights, residual, gate)


def taylor_extrapolate_blocks(
    snapshots: Tensor, weights: Tensor, gates: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """residual + Σ_l gates_l ⊙ Σ_k weights_{l,k} · snapshot_{l,k}: a whole skipped step in one launch.

    On a skipped step no cached module depends on the residual stream, so all of them are summed at once: every
    snapshot is read once and the residual stream written once.

    Args:
        snapshots: (L, K, B, N, D), float32, float16, bfloat16 (float64 on the CPU); any strides.
        weights: (K,) shared by all layers, or (L, K); float32 on the same device. A slot of weight 0 is not read.
        gates: (L, B, D) of the snapshots' type, broadcast over the tokens; 1 if None.
        residual: (B, N, D), of any of these types; 0 if None.

    Returns:
        (B, N, D), of the residual's type if there is one, else of the snapshots'. No gradient: for inference.

    Raises:
        TypeError: an argument of another type than those above.
        ValueError: a shape or device that does not fit; the sentence names the argument.
        RuntimeError: a CUDA tensor in a build without CUDA.
        NotImplementedError: a gradient is asked for.

    Source: TaylorSeer, arXiv 2503.06923, summed over all modules.
    """
    check_tensor("snapshots", snapshots, 5, "(layers, slots, batch, tokens, dim)")
    layers, slots, batch, tokens, dim = snapshots.shape
    _check_weights(weights, snapshots, [(slots,), (layers, slots)])
    _check_optional("gates", gates, snapshots, (layers, batch, dim), same_type=True)
    _check_optional("residual", residual, snapshots, (batch, tokens, dim), same_type=False)
    return torch.ops.haste.taylor_extrapolate_blocks(snapshots, weights, gates, residual)


def taylor_extrapolate_steps(snapshots: Tensor, weights: Tensor, gates: Tensor | None = None) -> Tensor:
    """out_s = Σ_l gates_{s,l} ⊙ Σ_k weights_{s,l,k} · snapshot_{l,k}: all skipped steps until the next full one.

    What the cached modules add to the residual stream at a skipped step depends on the step's time alone, so it can
    be made for all such steps in one pass over the snapshots: the traffic per skipped step falls by their number. On
    CUDA a pass makes at most 8 steps.

    Args:
        snapshots: (L, K, B, N, D), or (K, B, N, D) for a single layer, L = 1; float32, float16, bfloat16 (float64 on
            the CPU); any strides.
        weights: (S, K) shared by all layers, or (S, L, K); float32 on the same device. A slot adds nothing at a step
            where its weight is 0, and is not read if that is so at every step.
        gates: (S, L, B, D) of the snapshots' type, broadcast over the tokens; 1 if None.

    Returns:
        (S, B, N, D) of the snapshots' type, summed in float32 (float64 in float64) and rounded once. No gradient: for
        inference.

    Raises:
        TypeError: an argument of another type than those above.
        ValueError: a shape or device that does not fit; the sentence names the argument.
        RuntimeError: a CUDA tensor in a build without CUDA.
        NotImplementedError: a gradient is asked for.

    Source: TaylorSeer, arXiv 2503.06923, whose T_i are linear in the last i + 1 full features.
    """
    check_tensor("snapshots", snapshots)
    if snapshots.dim() not in (4, 5):
        raise ValueError(
            "snapshots must be (slots, batch, tokens, dim) or (layers, slots, batch, tokens, dim), got shape "
            f"{tuple(snapshots.shape)}"
        )
    layers = snapshots.shape[0] if snapshots.dim() == 5 else 1
    slots, batch, _, dim = snapshots.shape[-4:]
    check_tensor("weights", weights)
    steps = weights.shape[0] if weights.dim() else 0
    shapes = [(steps, slots), (steps, layers, slots)]
    _check_weights(weights, snapshots, shapes, f"(steps, {slots}) or (steps, {layers}, {slots})")
    _check_optional("gates", gates, snapshots, (steps, layers, batch, dim), same_type=True)
    return torch.ops.haste.taylor_extrapolate_steps(snapshots, weights, gates)


def _check_weights(weights: Tensor, snapshots: Tensor, shapes: list[tuple[int, ...]], must_be: str = "") -> None:
    check_tensor("weights", weights)
    if weights.dtype != torch.float32:
        raise TypeError(f"weights must be float32, got {weights.dtype}")
    if not any(_has_shape(weights, shape) for shape in shapes):
        must_be = must_be or " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"weights must be of shape {must_be}, got {tuple(weights.shape)}")
    check_same("weights", weights, "snapshots", snapshots, "device")


def _has_shape(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Size by size: under torch.compile they are symbols, of which a tuple in a list does not find its like."""
    if value.dim() != len(shape):
        return False
    return all(size == must_be for size, must_be in zip(value.shape, shape, strict=True))


def _check_optional(
    name: str, value: Tensor | None, snapshots: Tensor, shape: tuple[int, ...], same_type: bool
) -> None:
    if value is None:
        return
    check_tensor(name, value)
    if not _has_shape(value, shape):
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(value.shape)}")
    check_same(name, value, "snapshots", snapshots, *(("dtype", "device") if same_type else ("device",)))


@torch.library.register_fake("haste::taylor_extrapolate")
def _fake_single(snapshots, weights, residual=None, gate=None):
    check_devices(snapshots=snapshots, weights=weights, residual=residual, gate=gate)
    typed = snapshots if residual is None else residual
    return snapshots.new_empty(snapshots.shape[1:], dtype=typed.dtype)


@torch.library.register_fake("haste::taylor_extrapolate_blocks")
def _fake_blocks(snapshots, weights, gates=None, residual=None):
    check_devices(snapshots=snapshots, weights=weights, gates=gates, residual=residual)
    typed = snapshots if residual is None else residual
    return snapshots.new_empty(snapshots.shape[2:], dtype=typed.dtype)


@torch.library.register_fake("haste::taylor_extrapolate_steps")
def _fake_steps(snapshots, weights, gates=None):
    check_devices(snapshots=snapshots, weights=weights, gates=gates)
    return snapshots.new_empty((weights.shape[0], *snapshots.shape[-3:]))


ADVICE = "it is for inference; call it under torch.no_grad() or detach its inputs"
refuse_gradient("taylor_extrapolate", ADVICE)
refuse_gradient("taylor_extrapolate_blocks", ADVICE)
refuse_gradient("taylor_extrapolate_steps", ADVICE)
