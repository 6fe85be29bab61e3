"""attn_align_loss problems for the emulated kernels, and what is right for them: the definition in float64."""

from __future__ import annotations

import torch
from accuracy import assert_as_accurate_as_eager

from haste_ext import reference

NAMES = ("student_q", "student_k", "teacher_q", "teacher_k")


def operands_types_and_losses(types):
    """Every operand in every type, the losses in turn: each loss with every operand and with every type."""
    losses = ("cross_entropy", "kl")
    return [(operand, dtype, losses[(operand + n) % 2]) for operand in range(4) for n, dtype in enumerate(types)]


def operands(dtype, batch=1, heads=(2, 2), tokens=17, dims=(72, 64), seed=0):
    """Student q, k as views of a packed (B, N, 3, H, D) projection, teacher q, k contiguous."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, tokens, 3, heads[0], dims[0], generator=generator).to(dtype)
    teacher = torch.randn(2, batch, heads[1], tokens, dims[1], generator=generator).to(dtype)
    return [*packed.permute(2, 0, 3, 1, 4)[:2], *(x.clone() for x in teacher)]


def problem(tensors, scales=None, divergence="cross_entropy", causal=0):
    """What the driver reads: sizes, type, scales, and which loss it is."""
    batch, _, tokens, student_dim = tensors[0].shape
    teacher_dim = tensors[2].shape[3]
    heads = min(tensors[0].shape[1], tensors[2].shape[1])
    student_scale, teacher_scale = scales or (student_dim**-0.5, teacher_dim**-0.5)
    return {
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        "type": tensors[0].dtype,
        "student_dim": student_dim,
        "teacher_dim": teacher_dim,
        "student_scale": float(student_scale),
        "teacher_scale": float(teacher_scale),
        "kl": int(divergence == "kl"),
        "causal": causal,
    }


def forward(emulator, tensors, scales=None, seed=0, **loss):
    """loss (batch, heads, tokens), and the statistics of both softmaxes (batch, heads, tokens, 2)."""
    values = problem(tensors, scales, **loss)
    rows = (values["batch"], values["heads"], values["tokens"])
    names = ("loss", "student_softmax", "teacher_softmax")
    shapes = dict(zip(names, (rows, (*rows, 2), (*rows, 2)), strict=True))
    buffers = dict(zip(NAMES, tensors, strict=True))
    buffers |= {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    result = emulator("attn_align_loss_forward", buffers, names, seed, **values)
    return [result[name] for name in names]


def backward(
    emulator, tensors, grad_out, scales=None, seed=0, destinations=None, wanted=("grad_q", "grad_k"), saved=None, **loss
):
    """The wanted gradients, in `destinations` or in contiguous tensors of NaN. `saved`: what forward() has returned."""
    values = problem(tensors, scales, **loss)
    _, student_softmax, teacher_softmax = saved or forward(emulator, tensors, scales, **loss)
    shape = (values["batch"], values["heads"], values["tokens"], values["student_dim"])
    fresh = {name: torch.full(shape, float("nan"), dtype=tensors[0].dtype) for name in wanted}
    buffers = dict(zip(NAMES, tensors, strict=True)) | (destinations or fresh)
    buffers |= {"student_softmax": student_softmax, "teacher_softmax": teacher_softmax, "grad_out": grad_out}
    return emulator("attn_align_loss_backward", buffers, wanted, seed, **values)


def definition(tensors, grad_out, scales=None, **loss):
    """Row losses and the gradients of q and k, in the type of the tensors."""
    heads = min(tensors[0].shape[1], tensors[2].shape[1])
    student_scale, teacher_scale = scales or (None, None)
    tensors = [x[:, :heads].detach().clone() for x in tensors]
    q, k = (x.requires_grad_() for x in tensors[:2])
    rows = reference.attn_align_loss(q, k, *tensors[2:], student_scale, teacher_scale, reduction="none", **loss)
    rows.backward(grad_out.to(rows.dtype))
    return rows.detach(), q.grad, k.grad


def check_infinite_operand(emulator, tensors, operand, places, **loss):
    """Put infinities into one operand: a value of `places` into its token, each in a head of its own after the first.

    Rows whose definition in float64 is no finite number must be none, and so must their gradients; those that do not
    read the token, and the first head, must stay what they were. For "kl" the definition is that of the cross-entropy,
    in which a key that is infinitely far below has no part: 0 · log 0 is 0.
    """
    clean = forward(emulator, tensors, **loss)[0]
    tensors = [x.clone() for x in tensors]
    for head, (token, value) in enumerate(places.items(), start=1):
        tensors[operand][0, head, token, 5] = value
    grad_out = torch.ones(clean.shape)
    exact, dq, dk = definition([x.double() for x in tensors], grad_out, **{**loss, "divergence": "cross_entropy"})
    rows, *statistics = forward(emulator, tensors, **loss)
    gradients = backward(emulator, tensors, grad_out, saved=(rows, *statistics), **loss)
    lost = ~exact.isfinite()
    assert rows[lost].isnan().all() and not lost[0, 0].any() and torch.equal(rows[0, 0], clean[0, 0])
    assert all(gradient[0, 0].isfinite().all() for gradient in gradients.values())
    queries, block = torch.arange(clean.shape[2]), loss.get("causal") or clean.shape[2]
    for head, token in enumerate(places, start=1):
        assert lost[0, head].any()
        reads = queries == token if operand % 2 == 0 else queries // block >= token // block
        torch.testing.assert_close(rows[0, head, ~reads], clean[0, head, ~reads])
        seen = queries // block <= (token if operand % 2 == 0 else len(queries)) // block  # eager's 0 · ∞ goes further
        for ours, of_definition in ((gradients["grad_q"], dq), (gradients["grad_k"], dk)):
            expected = ~of_definition[0, head].isfinite() & seen[:, None]
            assert expected.any() and ours[0, head][expected].isnan().all()


def check(emulator, tensors, grad_out=None, scales=None, seed=0, **loss):
    """`loss`: divergence and causal, as the operation takes them."""
    batch, heads, tokens = (problem(tensors)[name] for name in ("batch", "heads", "tokens"))
    if grad_out is None:  # that of the mean: one number, expanded
        grad_out = torch.tensor(1 / (batch * heads * tokens)).expand(batch, heads, tokens)
    exact = definition([x.double() for x in tensors], grad_out, scales, **loss)
    eager = definition(tensors, grad_out, scales, **loss)
    rows, *statistics = forward(emulator, tensors, scales, seed, **loss)
    gradients = backward(emulator, tensors, grad_out, scales, seed, saved=(rows, *statistics), **loss)
    term = (grad_out.abs().max() * max(x.abs().max() for x in tensors[:2])).item()
    results = (rows, gradients["grad_q"], gradients["grad_k"])
    for name, ours, theirs, ref in zip(("loss", "dq", "dk"), results, eager, exact, strict=True):
        what = f"emulated {name}, {tensors[0].dtype}"
        assert_as_accurate_as_eager(ours, theirs, ref, what, 1.0 if name == "loss" else term)
