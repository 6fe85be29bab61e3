"""attn_align_loss on CUDA, emulated: against the definition in float64, wherever its operands lie."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager

from haste_ext import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("student_q", "student_k", "teacher_q", "teacher_k")


def operands(dtype, batch=1, heads=(2, 2), tokens=17, dims=(72, 64), seed=0):
    """Student q, k as views of a packed (B, N, 3, H, D) projection, teacher q, k contiguous."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, tokens, 3, heads[0], dims[0], generator=generator).to(dtype)
    teacher = torch.randn(2, batch, heads[1], tokens, dims[1], generator=generator).to(dtype)
    return [*packed.permute(2, 0, 3, 1, 4)[:2], *(x.clone() for x in teacher)]


def problem(tensors, scales=None):
    """What the driver reads: sizes, type and scales."""
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
    }


def forward(emulator, tensors, scales=None, seed=0):
    """loss (batch, heads, tokens), and the statistics of both softmaxes (batch, heads, tokens, 2)."""
    values = problem(tensors, scales)
    rows = (values["batch"], values["heads"], values["tokens"])
    names = ("loss", "student_softmax", "teacher_softmax")
    shapes = dict(zip(names, (rows, (*rows, 2), (*rows, 2)), strict=True))
    buffers = dict(zip(NAMES, tensors, strict=True))
    buffers |= {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    result = emulator("attn_align_loss_forward", buffers, names, seed, **values)
    return [result[name] for name in names]


def backward(emulator, tensors, upstream, scales=None, seed=0, destinations=None, wanted=("grad_q", "grad_k")):
    """The wanted gradients, in `destinations` or in contiguous tensors of NaN."""
    values = problem(tensors, scales)
    _, student_softmax, teacher_softmax = forward(emulator, tensors, scales)
    shape = (values["batch"], values["heads"], values["tokens"], values["student_dim"])
    fresh = {name: torch.full(shape, float("nan"), dtype=tensors[0].dtype) for name in wanted}
    buffers = dict(zip(NAMES, tensors, strict=True)) | (destinations or fresh)
    buffers |= {"student_softmax": student_softmax, "teacher_softmax": teacher_softmax, "upstream": upstream}
    return emulator("attn_align_loss_backward", buffers, wanted, seed, **values)


def definition(tensors, upstream, scales=None):
    """Row losses and the gradients of q and k, in the type of the tensors."""
    heads = min(tensors[0].shape[1], tensors[2].shape[1])
    student_scale, teacher_scale = scales or (None, None)
    tensors = [x[:, :heads].detach().clone() for x in tensors]
    q, k = (x.requires_grad_() for x in tensors[:2])
    rows = reference.attn_align_loss(q, k, *tensors[2:], student_scale, teacher_scale, reduction="none")
    rows.backward(upstream.to(rows.dtype))
    return rows.detach(), q.grad, k.grad


def check(emulator, tensors, upstream=None, scales=None, seed=0):
    batch, heads, tokens = (problem(tensors)[name] for name in ("batch", "heads", "tokens"))
    if upstream is None:  # that of the mean: one number, expanded
        upstream = torch.tensor(1 / (batch * heads * tokens)).expand(batch, heads, tokens)
    exact = definition([x.double() for x in tensors], upstream, scales)
    eager = definition(tensors, upstream, scales)
    loss = forward(emulator, tensors, scales, seed)[0]
    gradients = backward(emulator, tensors, upstream, scales, seed)
    term = (upstream.abs().max() * max(x.abs().max() for x in tensors[:2])).item()
    results = (loss, gradients["grad_q"], gradients["grad_k"])
    for name, ours, theirs, ref in zip(("loss", "dq", "dk"), results, eager, exact, strict=True):
        what = f"emulated {name}, {tensors[0].dtype}"
        assert_as_accurate_as_eager(ours, theirs, ref, what, 1.0 if name == "loss" else term)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", (1, 17, 64, 65, 100))
def test_any_number_of_tokens(emulator, dtype, tokens):
    check(emulator, operands(dtype, tokens=tokens), seed=tokens)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dims", ((8, 32), (32, 8), (40, 64), (64, 72), (96, 40), (128, 128), (1, 20), (121, 5)))
def test_any_head_dims(emulator, dtype, dims):
    check(emulator, operands(dtype, heads=(1, 1), tokens=70, dims=dims))


@pytest.mark.parametrize("dtype", TYPES)
def test_near_convergence(emulator, dtype):
    """The student within 1 % of its teacher: the gradient is a small difference of two maps."""
    q, k, noise_q, noise_k = operands(torch.float32, dims=(64, 64), tokens=65)
    student = [(q + 0.01 * noise_q).to(dtype), (k + 0.01 * noise_k).to(dtype)]
    check(emulator, [*student, q.to(dtype), k.to(dtype)])


@pytest.mark.parametrize("dtype", TYPES)
def test_batch_heads_and_scales(emulator, dtype):
    """Two of three student heads take part; a scale may be negative."""
    check(emulator, operands(dtype, batch=2, heads=(3, 2), tokens=20, dims=(40, 24)), scales=(-0.3, 0.5))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_a_row_of_logits_has_in_common_costs_the_loss_no_digits(emulator, dtype):
    """All logits of a row lie some 100 away from 0, of which neither map knows; the maps are almost the same."""
    q, k, noise_q, noise_k = operands(torch.float32, tokens=100, dims=(64, 64))
    tensors = [(x + 4).to(dtype) for x in (q + 0.01 * noise_q, k + 0.01 * noise_k, q, k)]
    exact, _, _ = definition([x.double() for x in tensors], torch.ones(1, 2, 100), (None, None))
    eager, _, _ = definition(tensors, torch.ones(1, 2, 100), (None, None))
    ours, student_softmax, _ = forward(emulator, tensors)
    assert student_softmax[..., 0].min() > 50
    assert_as_accurate_as_eager(ours, eager, exact, f"loss {dtype}", 1.0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scales", ((9.0, -15.0), (300.0, 200.0)))
def test_logits_beyond_a_plain_exponential(emulator, dtype, scales):
    """e^logit overflows, and one float for a log-sum-exp would lose what the smaller logits add to it."""
    tensors = operands(dtype, tokens=40, dims=(40, 24))
    _, student_softmax, _ = forward(emulator, tensors, scales)
    assert student_softmax[..., 0].max() > 128  # powers of 2
    check(emulator, tensors, torch.ones(1, 2, 40), scales)


@pytest.mark.parametrize("size", (2.0**40, 2.0**63, 2.0**127))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logits_beyond_float_give_no_nan(emulator, dtype, size):
    """Where all products have one sign, so that no sum of them is ∞ − ∞; equal keys share a row's attention."""
    tensors = [torch.full((1, 1, 20, 16), size, dtype=dtype) for _ in NAMES]
    loss, _, _ = forward(emulator, tensors)
    gradients = backward(emulator, tensors, torch.full((1, 1, 20), 1e-30))
    assert torch.allclose(loss, torch.tensor(20.0).log())
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("odd", ("start", "batch", "head", "token"))
def test_unaligned_operands(emulator, dtype, odd):
    """The first element, or one stride of the three, off the 16-byte boundary: no vector access may touch them."""
    unaligned = []
    for x in operands(dtype, batch=2, tokens=9, dims=(40, 24)):
        batch, heads, tokens, dim = x.shape
        token_stride = dim + (odd == "token")
        head_stride = -(-tokens * token_stride // 8) * 8 + (odd == "head")
        batch_stride = -(-heads * head_stride // 8) * 8 + (odd == "batch")
        room = torch.zeros(batch * batch_stride + 1, dtype=dtype)
        view = room.as_strided(x.shape, (batch_stride, head_stride, token_stride, 1), int(odd == "start"))
        unaligned.append(view.copy_(x))
    check(emulator, unaligned)


@pytest.mark.parametrize("dtype", TYPES)
def test_upstream_of_every_row(emulator, dtype):
    """Rows of very different, and of no, weight, laid out either way."""
    tensors = operands(dtype, batch=2, heads=(1, 1), tokens=70, dims=(32, 40))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, 1, 70, generator=generator) * torch.logspace(-8, 0, 70)
    upstream[:, :, ::7] = 0
    check(emulator, tensors, upstream)
    check(emulator, tensors, (upstream.mT.contiguous() * 1e-3).mT)


def test_no_upstream_gives_zeros(emulator):
    tensors = operands(torch.float16, tokens=20)
    gradients = backward(emulator, tensors, torch.zeros(1, 2, 20))
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", TYPES)
def test_only_the_wanted_gradient(emulator, dtype):
    """Each alone is what both together give, to the bit, whatever the order of the threads."""
    tensors = operands(dtype, tokens=40)
    upstream = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(2))
    both = backward(emulator, tensors, upstream)
    for seed, name in enumerate(both, start=1):
        alone = backward(emulator, tensors, upstream, seed=seed, wanted=(name,))
        assert torch.equal(alone[name], both[name])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", (0, 1))
def test_gradients_go_where_they_are_told(emulator, dtype, offset):
    """Into views of one packed tensor, aligned or not; its other elements stay as they were."""
    tensors = operands(dtype, tokens=20, dims=(40, 24))
    upstream = torch.rand(1, 2, 20, generator=torch.Generator().manual_seed(3))
    room = torch.full((20 * 3 * 2 * 40 + offset,), 7.0, dtype=dtype)
    packed = room[offset:].view(1, 20, 3, 2, 40).permute(2, 0, 3, 1, 4)
    views = {"grad_q": packed[0], "grad_k": packed[1]}
    written = backward(emulator, tensors, upstream, destinations=views)
    expected = backward(emulator, tensors, upstream)
    for name in views:
        assert torch.equal(written[name], expected[name])
    everything = written["grad_q"].as_strided(room.shape, (1,), 0)[offset:].view(1, 20, 3, 2, 40)
    assert (everything[:, :, 1:] == 7).all()


@pytest.mark.parametrize("shape", ((0, 2, 5), (2, 0, 5), (2, 2, 0)))
def test_nothing_to_do(emulator, shape):
    batch, heads, tokens = shape
    tensors = operands(torch.float32, batch, (heads, heads), tokens)
    assert forward(emulator, tensors)[0].shape == shape
    assert backward(emulator, tensors, torch.zeros(shape))["grad_k"].shape == (*shape, 72)


def test_refusals(emulator):
    with pytest.raises(emulator.Refused, match="not float64"):
        forward(emulator, operands(torch.float64))
    with pytest.raises(emulator.Refused, match="head dims of 1 to 128"):
        forward(emulator, operands(torch.float16, dims=(129, 64)))
