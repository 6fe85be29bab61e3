"""On a GPU: the current stream and device are honoured, and a CUDA graph can hold every operation."""

from __future__ import annotations

import pytest
import torch
from operations import LOSSES, OPERATIONS

import haste_ext

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and haste_ext.build_info()["cuda"]),
    reason="needs a GPU and a build with the CUDA kernels",
)
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LONG = 100_000_000  # clock cycles: tens of milliseconds


def cuda_operands(operation, device="cuda", seed=0):
    """Several blocks of every kernel."""
    return operation.operands(device, dtype=torch.bfloat16, batch=3, tokens=130, dim=72, seed=seed)


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_cuda_work_waits_for_the_stream_that_makes_its_inputs(operation):
    """The inputs are late on a stream of their own: a kernel on any other stream would read what was there before."""
    values = cuda_operands(operation)
    expected = operation.results(operation.ours, values)
    late = [torch.full_like(x, torch.nan) for x in values]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for target, value in zip(late, values, strict=True):
            target.copy_(value)
        ours = operation.results(operation.ours, late)
    stream.synchronize()
    assert_same(ours, expected)


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_cuda_backward_runs_on_the_stream_of_its_forward(operation):
    values = cuda_operands(operation)
    expected = operation.results(operation.ours, values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        student = [x.clone().requires_grad_() for x in values[: operation.differentiable]]
        torch.cuda._sleep(LONG)
        loss = operation.ours(*student, *values[operation.differentiable :])
    loss.backward()  # from the default stream
    torch.cuda.synchronize()
    assert_same([loss.detach(), *(x.grad for x in student)], expected)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_cuda_graph_replays_forward_and_backward_on_new_values(operation):
    static = cuda_operands(operation, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up once is set up before the capture
        operation.results(operation.ours, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operation.results(operation.ours, static)
    for seed in (2, 3):
        values = cuda_operands(operation, seed=seed)
        for target, value in zip(static, values, strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, operation.results(operation.ours, values))


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_cuda_memory_beyond_the_results_is_small(operation):
    """No map, no copy of the operands: two numbers per row and side at the most."""
    operands = cuda_operands(operation)
    rows = operands[0].numel() // operands[0].shape[-1]
    operation.results(operation.ours, operands)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = operation.results(operation.ours, operands)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)
    assert extra <= 8 * rows * 4 + 32 * 512, "the caching allocator counts in 512 bytes"


@needs_two_gpus
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_cuda_tensors_of_a_second_gpu(operation):
    """The current device is the first and stays so; the results lie on the second."""
    expected = operation.results(operation.ours, cuda_operands(operation, "cuda:0"))
    assert torch.cuda.current_device() == 0
    ours = operation.results(operation.ours, cuda_operands(operation, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in ours)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert_same(ours, expected)


@needs_two_gpus
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_cuda_tensors_of_two_gpus_are_refused(operation):
    first, second, *others = cuda_operands(operation, "cuda:0")
    with pytest.raises(ValueError, match=r"must have the device of \w+, cuda:0, got cuda:1"):
        operation.ours(first, second.to("cuda:1"), *others)
