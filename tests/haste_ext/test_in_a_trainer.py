"""What a trainer does around an operation: autocast, checkpointing, compilation, data parallelism, transforms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import ATTN_ALIGN_LOSS, LOSSES, OPERATIONS, TAYLOR_OPERATIONS, TOKEN_COSINE_LOSS
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SUPPORT = Path(__file__).parents[1] / "support"


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_under_autocast_the_loss_stays_float32(operation, device):
    """Operands are taken in the type that autocast's layers give them; none is cast again."""
    layer = nn.Linear(16, 16).to(device)
    operands = operation.operands(device)
    with torch.autocast(device, torch.bfloat16):
        projected = layer(operands[0])
        inputs = [projected, *(layer(x).detach() for x in operands[1 : operation.differentiable]), *operands[2:]]
        inputs = inputs if operation is ATTN_ALIGN_LOSS else [projected, operands[1]]
        loss = operation.ours(*inputs)
    assert projected.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, operation.ours(*inputs))
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().max() > 0


class UpstreamStrides(TorchDispatchMode):
    """Notes the strides of the gradient that the kernels of a backward are given."""

    strides = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith("haste::") and function.name().endswith("_backward"):
            self.strides = args[0].stride()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_a_loss_is_one_node_and_hands_its_kernels_one_number(operation, reduction, device):
    """Between a loss and its operands stands nothing else, and no gradient of equal rows is written out to be read."""
    operands = operation.operands(device)
    student = [x.requires_grad_() for x in operands[: operation.differentiable]]
    loss = operation.ours(*operands, reduction=reduction)
    leaves = [node.variable for node, _ in loss.grad_fn.next_functions if node is not None]
    assert len(leaves) == len(student) and all(leaf is x for leaf, x in zip(leaves, student, strict=True))
    with UpstreamStrides() as seen:
        loss.backward(torch.ones_like(loss))
    assert seen.strides == loss.stride() if reduction == "none" else not any(seen.strides)


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_beside_a_frozen_student_nothing_asks_for_a_gradient(operation, compiled, device):
    """Though the teacher learns: the loss is a number, and what else is summed with it has its gradient."""
    torch._dynamo.reset()
    operands = operation.operands(device)
    for x in operands[operation.differentiable :]:
        x.requires_grad_()
    loss = torch.compile(operation.ours, fullgraph=True, backend="aot_eager") if compiled else operation.ours
    other = torch.ones((), device=device, requires_grad=True)
    value = loss(*operands)
    (value + other).backward()
    assert not value.requires_grad and other.grad == 1 and all(x.grad is None for x in operands)


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_the_backward_is_compiled_in_one_graph(operation, device):
    torch._dynamo.reset()
    operands = operation.operands(device)
    expected = operation.results(operation.ours, operands)[1:]
    student = [x.requires_grad_() for x in operands[: operation.differentiable]]
    loss = operation.ours(*operands).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        loss.backward()
    assert_same([x.grad for x in student], expected)


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_activation_checkpointing_changes_no_bit(operation, use_reentrant, device):
    operands = operation.operands(device, dtype=torch.bfloat16)
    expected = operation.results(operation.ours, operands)
    student = [x.requires_grad_() for x in operands[: operation.differentiable]]
    loss = checkpoint(operation.ours, *operands, use_reentrant=use_reentrant)
    loss.backward()
    assert_same([loss.detach(), *(x.grad for x in student)], expected)


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_gradients_accumulate_over_micro_batches(operation, device):
    operands = operation.operands(device, batch=4)
    whole = operation.results(lambda *x: operation.ours(*x, reduction="sum"), operands)
    halves = [operation.results(lambda *x: operation.ours(*x, reduction="sum"), half) for half in split(operands)]
    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    assert_same(whole[1:], [torch.cat(pair) for pair in zip(halves[0][1:], halves[1][1:], strict=True)])


def split(operands):
    return zip(*(x.chunk(2) for x in operands), strict=True)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_compiled_by_inductor_with_dynamic_shapes(operation, device):
    if device == "cpu":
        pytest.skip("the C++ that inductor writes takes long to compile; aot_eager is tested in each operation's file")
    torch._dynamo.reset()
    compiled = torch.compile(operation.ours, fullgraph=True, dynamic=True)
    for tokens in (9, 33):
        operands = operation.operands(device, dtype=torch.bfloat16, tokens=tokens)
        ours, eager = (operation.results(f, operands) for f in (compiled, operation.ours))
        torch.testing.assert_close(ours, eager)


def test_distributed_data_parallel_averages_the_gradients(tmp_path):
    """Two processes with half a batch each have the gradients of the whole batch."""
    command = [sys.executable, SUPPORT / "data_parallel_step.py", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output.decode()
    first, second, whole = (torch.load(tmp_path / f"{name}.pt") for name in ("rank0", "rank1", "whole"))
    for name in whole:
        assert torch.equal(first[name], second[name]) and whole[name].abs().max() > 0
        torch.testing.assert_close(first[name], whole[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_vmap_is_a_loop(operation, device):
    """Ensembles work, gradients too; torch loops over the operation and says so once."""
    members = [operation.operands(device, seed=seed) for seed in range(3)]
    stacked = [torch.stack(x) for x in zip(*members, strict=True)]
    expected = [operation.results(operation.ours, operands) for operands in members]
    mapped = operation.results(torch.func.vmap(operation.ours), stacked)
    assert_same(mapped, [torch.stack(x) for x in zip(*expected, strict=True)])


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # within torch.func.jvp
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_transforms_are_refused(operation, transform, device):
    """As torch answers without being told: jvp with tangents of zero, grad with an error about a static method."""
    first, *others = operation.operands(device)
    with pytest.raises(NotImplementedError, match=r"is under a transform of torch\.func; .* take torch\.autograd"):
        TRANSFORMS[transform](lambda x: operation.ours(x, *others), first)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_forward_mode_tangent_is_refused_not_dropped(operation, device):
    first, *others = operation.operands(device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
            operation.ours(dual, *others)
        operation.ours(first, *others)


ATTENTION = [torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
FEATURES = [x[:, 0] for x in ATTENTION[:2]]
SETTINGS = (None, None, 0, 0)
FORMS = {
    "attn_align_loss": ATTENTION,
    "attn_align_loss_forward": [*ATTENTION, *SETTINGS],
    "attn_align_loss_backward": [
        *(torch.ones(2, 3, 9), *ATTENTION, torch.ones(2, 3, 9, 2), torch.ones(2, 3, 9, 2)),
        *(*SETTINGS, True, True),
    ],
    "token_cosine_loss": FEATURES,
    "token_cosine_loss_forward": FEATURES,
    "token_cosine_loss_backward": [torch.ones(2, 9), *FEATURES],
} | {operation.name: operation.operands() for operation in TAYLOR_OPERATIONS}


def test_the_forms_of_torch_ops_are_these():
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("haste::")]
    assert sorted(names) == sorted(FORMS)


def with_one_changed(form, change):
    """torch.ops' own form, and its arguments with one tensor changed, for each of them."""
    arguments = FORMS[form]
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            yield getattr(torch.ops.haste, form), [*arguments[:i], change(argument), *arguments[i + 1 :]]


@pytest.mark.parametrize("form", FORMS)
def test_one_meta_tensor_among_others_is_refused(form):
    """torch sends the call to the fake kernel, whose memory nobody fills."""
    for call, arguments in with_one_changed(form, lambda x: x.to("meta")):
        with pytest.raises(ValueError, match="must have the device of"):
            call(*arguments)


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_torch_ops_drops_a_tangent(form):
    with forward_ad.dual_level():
        for call, arguments in with_one_changed(form, lambda x: forward_ad.make_dual(x, torch.ones_like(x))):
            with pytest.raises(NotImplementedError, match="carries a forward-mode tangent"):
                call(*arguments)
        getattr(torch.ops.haste, form)(*FORMS[form])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # within torch.func.jvp
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_form_of_torch_ops_goes_under_other_transforms(form, transform):
    def call(x):
        out = getattr(torch.ops.haste, form)(x, *FORMS[form][1:])
        return out if isinstance(out, torch.Tensor) else out[0]

    with pytest.raises(NotImplementedError, match=r"is under a transform of torch\.func"):
        TRANSFORMS[transform](call, FORMS[form][0])


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_a_teacher_in_inference_mode_is_refused_with_what_to_do(operation, device):
    """Such a tensor cannot be kept for the backward; torch says so, and a clone or torch.no_grad() serves."""
    operands = operation.operands(device)
    expected = operation.results(operation.ours, operands)
    with torch.inference_mode():
        teacher = [x.clone() for x in operands[operation.differentiable :]]
    student = operands[: operation.differentiable]
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved for backward.*clone"):
        operation.results(operation.ours, [*student, *teacher])
    with torch.no_grad():
        assert torch.equal(operation.ours(*student, *teacher), expected[0])
    assert_same(operation.results(operation.ours, [*student, *(x.clone() for x in teacher)]), expected)


def test_gradients_of_only_q_or_only_k_wherever_they_lie(device):
    q, k, *teacher = ATTN_ALIGN_LOSS.operands(device, dtype=torch.bfloat16)
    _, grad_q, grad_k = ATTN_ALIGN_LOSS.results(ATTN_ALIGN_LOSS.ours, [q, k, *teacher])
    for wanted, expected in ((0, grad_q), (1, grad_k)):
        inputs = [x.mT.contiguous().mT for x in (q, k)]  # read as copies
        inputs[wanted].requires_grad_()
        ATTN_ALIGN_LOSS.ours(*inputs, *teacher).backward()
        assert torch.equal(inputs[wanted].grad, expected)


def test_a_gradient_that_is_not_a_whole_tensor_reaches_a_packed_projection(device):
    """q and k are views of one tensor: what they do not show of it has gradient zero."""
    packed = torch.randn(2, 9, 3, 3, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    teacher = ATTN_ALIGN_LOSS.operands(device)[2:]
    ATTN_ALIGN_LOSS.ours(q, k, *teacher).backward()
    _, grad_q, grad_k = ATTN_ALIGN_LOSS.results(ATTN_ALIGN_LOSS.ours, [q.detach(), k.detach(), *teacher])
    assert_same(list(packed.grad.permute(2, 0, 3, 1, 4)), [grad_q, grad_k, torch.zeros_like(grad_k)])
    assert TOKEN_COSINE_LOSS.ours(packed.flatten(2)[..., :8], packed.detach().flatten(2)[..., 8:16]).requires_grad
