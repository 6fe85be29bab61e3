"""attn_align_loss against its definition in float64, and as a torch operation among others."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import haste_ext
from haste_ext import reference

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32, torch.float32)


AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # where the rule holds without exception


def operands(batch, heads, tokens, dims, types, device="cpu", seed=0):
    """Student q, k as views of a packed (B, N, 3, H, D) projection, teacher q, k contiguous.

    heads, tokens, dims and types: of the student and of the teacher.
    """
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, tokens[0], 3, heads[0], dims[0], generator=generator).to(device, types[0])
    teacher = torch.randn(2, batch, heads[1], tokens[1], dims[1], generator=generator).to(device, types[1])
    return [*packed.permute(2, 0, 3, 1, 4)[:2], *teacher]


def skip_float64_on_cuda(device, *types):
    if device == "cuda" and torch.float64 in types:
        pytest.skip("float64 is for the CPU")


def values_and_gradients(loss, tensors, grad_out=None, **kwargs):
    q, k = (x.detach().clone().requires_grad_() for x in tensors[:2])
    out = loss(q, k, *tensors[2:], **kwargs)
    out.backward(torch.ones_like(out) if grad_out is None else grad_out.to(out.dtype))
    return out.detach(), q.grad, k.grad


def check_against_definition(tensors, grad_out=None, **kwargs):
    """Row losses, and the gradients that `grad_out`, by default that of their mean, gives."""
    student_type, teacher_type = tensors[0].dtype, tensors[2].dtype
    working = torch.promote_types(student_type, teacher_type)
    if student_type != torch.float64 and working == torch.float64:
        working = torch.float32
    rows = haste_ext.attn_align_loss(*tensors, reduction="none", **kwargs)
    grad_out = torch.full_like(rows, 1 / max(rows.numel(), 1), dtype=torch.float64) if grad_out is None else grad_out
    kwargs |= {"reduction": "none", "grad_out": grad_out}
    exact = values_and_gradients(reference.attn_align_loss, [t.double() for t in tensors], **kwargs)
    eager = values_and_gradients(reference.attn_align_loss, [t.to(working) for t in tensors], **kwargs)
    ours = values_and_gradients(haste_ext.attn_align_loss, tensors, **kwargs)
    term = (grad_out.abs().max() * max(x.abs().max() for x in tensors[:2])).item() if rows.numel() else 0.0
    for name, mine, theirs, ref in zip(("loss", "dq", "dk"), ours, eager, exact, strict=True):
        terms, few = 1.0 if name == "loss" else term, ref.numel() <= 256 and not AVX512
        assert_as_accurate_as_eager(mine, theirs, ref, f"{name} {student_type}", terms, few)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("tokens", (1, 17, 64, 255, 257))
def test_values_and_gradients(dtype, tokens, device):
    check_against_definition(operands(2, (3, 2), (tokens, tokens), (72, 64), (dtype, dtype), device))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_near_convergence(dtype, device):
    """The student within 1 % of its teacher: the gradient is a small difference of two maps."""
    q, k, noise_q, noise_k = operands(2, (4, 4), (64, 64), (64, 64), FLOAT32, device)
    teacher = [q.to(dtype), k.to(dtype)]
    student = [(q + 0.01 * noise_q).to(dtype), (k + 0.01 * noise_k).to(dtype)]
    check_against_definition([*student, *teacher])


@pytest.mark.parametrize("student_type", (torch.float64, *FLOAT_TYPES))
@pytest.mark.parametrize("teacher_type", (torch.float64, *FLOAT_TYPES))
def test_student_and_teacher_of_any_types(student_type, teacher_type, device):
    skip_float64_on_cuda(device, student_type, teacher_type)
    check_against_definition(operands(1, (2, 2), (33, 33), (40, 24), (student_type, teacher_type), device))


def test_prefixes_heads_and_scales(device):
    tensors = operands(2, (5, 3), (20, 21), (8, 16), FLOAT32, device)
    check_against_definition(tensors, student_prefix=4, teacher_prefix=5, student_scale=0.3, teacher_scale=0.7)
    _, grad_q, grad_k = values_and_gradients(haste_ext.attn_align_loss, tensors, student_prefix=4, teacher_prefix=5)
    for grad in (grad_q, grad_k):
        assert not grad[:, 3:].any() and not grad[:, :, :4].any(), "heads and tokens left out must get zero"
        assert grad[:, :3, 4:].abs().min() > 0


def test_what_stands_in_a_prefix_or_in_other_heads_is_not_read(device):
    """Infinity there changes no bit, and gets a gradient of zero."""
    for dtype in FLOAT_TYPES:
        tensors = operands(2, (5, 3), (24, 25), (8, 16), (dtype, dtype), device)
        spoiled = [x.clone() for x in tensors]
        for x, prefix in zip(spoiled, (4, 4, 5, 5), strict=True):
            x[:, :, :prefix], x[:, 3:] = torch.inf, torch.nan
        kwargs = {"student_prefix": 4, "teacher_prefix": 5, "reduction": "none"}
        ours, expected = (values_and_gradients(haste_ext.attn_align_loss, x, **kwargs) for x in (spoiled, tensors))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_reductions_agree_and_none_takes_a_gradient_per_row(device):
    tensors = operands(2, (3, 3), (17, 17), (8, 8), FLOAT32, device)
    rows = haste_ext.attn_align_loss(*tensors, reduction="none")
    assert rows.shape == (2, 3, 17)
    torch.testing.assert_close(haste_ext.attn_align_loss(*tensors), rows.mean())
    torch.testing.assert_close(haste_ext.attn_align_loss(*tensors, reduction="sum"), rows.sum())
    grad_out = torch.randn(2, 17, 3, dtype=torch.float64, device=device).transpose(
        1, 2
    )  # neither contiguous nor constant
    check_against_definition(tensors, grad_out=grad_out)


def test_gradients_exactly_by_gradcheck():
    q, k, tq, tk = operands(2, (2, 2), (7, 8), (5, 3), (torch.float64, torch.float64))
    q, k = (x.detach().clone().requires_grad_() for x in (q, k))
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda q, k, how=reduction: haste_ext.attn_align_loss(q, k, tq, tk, teacher_prefix=1, reduction=how), (q, k)
        )


def test_nothing_flows_to_the_teacher_and_unwanted_gradients_are_skipped(device):
    q, k, tq, tk = (x.detach().clone().requires_grad_() for x in operands(1, (2, 2), (9, 9), (8, 8), FLOAT32, device))
    haste_ext.attn_align_loss(q, k, tq, tk).backward()
    assert tq.grad is None and tk.grad is None and q.grad is not None and k.grad is not None
    both_q, both_k = q.grad, k.grad
    for wanted, frozen, expected in ((q, k, both_q), (k, q, both_k)):
        wanted.grad = None
        args = (wanted, frozen.detach()) if wanted is q else (frozen.detach(), wanted)
        haste_ext.attn_align_loss(*args, tq, tk).backward()
        assert torch.equal(wanted.grad, expected)
    with torch.no_grad():
        assert not haste_ext.attn_align_loss(q, k, tq, tk).requires_grad


def test_double_backward_is_refused():
    q, k, tq, tk = operands(1, (1, 1), (5, 5), (4, 4), FLOAT32)
    q = q.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(haste_ext.attn_align_loss(q, k, tq, tk), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        grad.sum().backward()


def test_the_same_input_gives_the_same_bits(device):
    tensors = operands(3, (2, 2), (100, 100), (72, 64), (torch.bfloat16,) * 2, device)
    first, second = (values_and_gradients(haste_ext.attn_align_loss, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batches_heads_and_tokens(device):
    for batch, heads, tokens in ((0, 2, 4), (2, 0, 4), (2, 2, 0)):
        q, k, tq, tk = operands(batch, (heads, heads), (tokens, tokens), (8, 8), FLOAT32, device)
        loss, grad_q, _ = values_and_gradients(haste_ext.attn_align_loss, (q, k, tq, tk), reduction="sum")
        assert loss.item() == 0 and grad_q.shape == q.shape
        assert haste_ext.attn_align_loss(q, k, tq, tk, reduction="none").shape == (batch, heads, tokens)


def test_values_near_the_limit_of_half_precision_stay_finite(device):
    """Logits of 1e5 and maps that are one-hot: log(softmax) would be −inf here."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensors = [x * 200 for x in operands(1, (2, 2), (33, 33), (64, 64), (dtype, dtype), device)]
        exact = values_and_gradients(reference.attn_align_loss, [t.double() for t in tensors])
        ours = values_and_gradients(haste_ext.attn_align_loss, tensors)
        assert all(torch.isfinite(x).all() for x in ours)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_type_and_layout(device, data):
    draw = data.draw
    dtype = draw(st.sampled_from(FLOAT_TYPES if device == "cuda" else (torch.float64, *FLOAT_TYPES)))
    heads, prefix = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(0, 3)] * 2))
    dims, rows = draw(st.tuples(*[st.integers(1, 128)] * 2)), draw(st.integers(1, 70))
    tokens = tuple(rows + p for p in prefix)
    tensors = operands(draw(st.integers(1, 3)), heads, tokens, dims, (dtype, dtype), device, draw(st.integers(0, 99)))
    if draw(st.booleans()):  # a last stride that is not 1
        tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    check_against_definition(tensors, student_prefix=prefix[0], teacher_prefix=prefix[1])


def test_opcheck(device):
    q, k, tq, tk = operands(2, (3, 2), (10, 12), (8, 4), FLOAT32, device)
    q, k = (x.detach().requires_grad_() for x in (q, k))
    settings_, last = (None, 0.5, 0, 2), (True, 3)
    for rest in (("sum",), ("mean", "kl", 4), ("none", "cross_entropy", 1)):
        torch.library.opcheck(torch.ops.haste.attn_align_loss.default, (q, k, tq, tk, *settings_, *rest))
    q, k = q.detach(), k.detach()
    torch.library.opcheck(torch.ops.haste.attn_align_loss_forward.default, (q, k, tq, tk, *settings_, *last))
    rows, softmax, teacher_softmax = torch.ops.haste.attn_align_loss_forward(q, k, tq, tk, *settings_, *last)
    args = (torch.ones_like(rows), q, k, tq, tk, softmax, teacher_softmax, *settings_)
    torch.library.opcheck(torch.ops.haste.attn_align_loss_backward.default, (*args, True, True))
    torch.library.opcheck(torch.ops.haste.attn_align_loss_backward.default, (*args, False, True, 3))
    by_columns = [x.mT.contiguous().mT for x in (q, k)]
    args = (torch.ones_like(rows), *by_columns, tq, tk, softmax, teacher_softmax, *settings_)
    torch.library.opcheck(torch.ops.haste.attn_align_loss_backward.default, (*args, True, True))


STRIDES = {
    "windows one element apart": (60, 20, 1, 1),
    "everything one element apart": (1, 1, 1, 1),
    "heads one element apart, batches in one place": (0, 1, 2, 1),
    "tokens before heads before batches": (8, 16, 48, 1),
    "one token everywhere": (24, 8, 0, 1),
    "last stride not 1": (120, 40, 1, 5),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_gradients_of_students_that_lie_anyhow(strides, device):
    """A gradient has memory of its own, laid out as the fake kernel says, whatever elements of theirs share a place."""
    teacher = operands(2, (3, 3), (5, 5), (8, 8), FLOAT32, device)[2:]
    memory = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for loss, dtype in ((reference.attn_align_loss, torch.float64), (haste_ext.attn_align_loss, torch.float32)):
        leaf = memory.to(dtype).clone().requires_grad_()
        q, k = (x.as_strided((2, 3, 5, 8), strides) for x in leaf)
        loss(q, k, *teacher).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1].double(), results[0], rtol=1e-4, atol=1e-7)
    q, k = (x.as_strided((2, 3, 5, 8), strides) for x in memory)
    settings_ = (None, None, 0, 0)
    rows, *softmax = torch.ops.haste.attn_align_loss_forward(q, k, *teacher, *settings_)
    args = (torch.ones_like(rows), q, k, *teacher, *softmax, *settings_, True, True)
    for gradient in torch.ops.haste.attn_align_loss_backward(*args):
        assert gradient.stride(-1) == 1
    torch.library.opcheck(torch.ops.haste.attn_align_loss_backward.default, args, test_utils="test_faketensor")


def test_no_graph_break_with_dynamic_shapes(device):
    torch._dynamo.reset()
    compiled = torch.compile(haste_ext.attn_align_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        tensors = operands(2, (2, 2), (tokens, tokens), (8, 8), FLOAT32, device)
        ours, eager = (values_and_gradients(f, tensors) for f in (compiled, haste_ext.attn_align_loss))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


q4 = torch.zeros(2, 3, 4, 8)
REFUSED = {
    "not a tensor": (TypeError, "student_q must", ([1.0], q4, q4, q4), {}),
    "integers": (TypeError, "teacher_k must", (q4, q4, q4, q4.long()), {}),
    "three dimensions": (ValueError, "student_k must", (q4, q4[0], q4, q4), {}),
    "q and k of two shapes": (ValueError, "teacher_k must", (q4, q4, q4, q4[:, :2]), {}),
    "q and k of two types": (TypeError, "student_k must", (q4, q4.half(), q4, q4), {}),
    "batch": (ValueError, "teacher_q must", (q4, q4, q4[:1], q4[:1]), {}),
    "tokens": (ValueError, "teacher_q must", (q4,) * 4, {"teacher_prefix": 1}),
    "prefix too long": (ValueError, "student_prefix must", (q4,) * 4, {"student_prefix": 5}),
    "prefix not an int": (TypeError, "student_prefix must", (q4,) * 4, {"student_prefix": 1.0}),
    "no dimension": (ValueError, "student_q must", (q4[..., :0], q4[..., :0], q4, q4), {}),
    "scale": (TypeError, "teacher_scale must", (q4,) * 4, {"teacher_scale": "1"}),
    "reduction": (
        ValueError,
        "reduction must",
        (q4,) * 4,
        {"reduction": "avg"},
    ),
    "divergence": (
        ValueError,
        "divergence must",
        (q4,) * 4,
        {"divergence": "js"},
    ),
    "negative mask": (ValueError, "causal must", (q4,) * 4, {"causal": -1}),
    "mask beyond int64": (ValueError, "causal must", (q4,) * 4, {"causal": 2**63}),
    "mask not an int": (TypeError, "causal must", (q4,) * 4, {"causal": 1.0}),
    "mask a bool": (TypeError, "causal must", (q4,) * 4, {"causal": True}),
    "prefix a tensor": (TypeError, "student_prefix must", (q4,) * 4, {"student_prefix": torch.tensor(1)}),
    "scale a bool": (TypeError, "student_scale must", (q4,) * 4, {"student_scale": True}),
    "scale that waits for a gradient": (
        TypeError,
        "teacher_scale must",
        (q4,) * 4,
        {"teacher_scale": torch.nn.Parameter(torch.tensor(0.5))},
    ),
    "scale beyond float": (ValueError, "student_scale must", (q4,) * 4, {"student_scale": 10**400}),
    "sparse": (TypeError, "student_q must", (q4.to_sparse(), q4, q4, q4), {}),
    "device": (ValueError, "teacher_q must", (q4, q4, q4.to("meta"), q4.to("meta")), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_argument_named(case):
    error, message, args, kwargs = REFUSED[case]
    with pytest.raises(error, match=message):
        haste_ext.attn_align_loss(*args, **kwargs)


def test_the_compiled_side_checks_again():
    with pytest.raises(RuntimeError, match="teacher_q must"):
        torch.ops.haste.attn_align_loss_forward(q4, q4, q4[:, :, 1:], q4[:, :, 1:], None, None, 0, 0, False, 0)
    with pytest.raises(RuntimeError, match="causal must"):
        torch.ops.haste.attn_align_loss_forward(q4, q4, q4, q4, None, None, 0, 0, False, -1)
