"""CUDA graphs: the bookkeeping around them with a stand-in on the host, and the real thing where there is a GPU."""

from __future__ import annotations

import haste.cuda_graphs
import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import cuda_graphs, enable_cache
from haste.errors import UserError
from haste.samplers import sample

GUIDED = {"num_steps": 12, "cfg_scale": 2.0, "guidance_low": 0.3, "guidance_high": 0.8, "null": 10}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def captures(monkeypatch) -> list:
    """In place of a capture: a replay computes anew from the captured inputs, into the memory of the first output."""
    captured = []

    def stand_in(function, inputs):
        output = function(*inputs)
        captured.append(function.__name__)

        def replay():
            for kept, new in zip(output, function(*inputs), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return replay, output

    monkeypatch.setattr(haste.cuda_graphs, "capture", stand_in)
    return captured


def graphed(model, **settings):
    """As CachedModel.capture leaves it, without its question for a GPU."""
    cached = enable_cache(model, **settings)
    (functions,) = cached._functions
    cached._functions = [{name: cuda_graphs.GRAPHED[name](function) for name, function in functions.items()}]
    return cached


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
def test_replayed_it_draws_the_same(granularity, captures):
    settings = {"cache": "taylor", "interval": 3, "order": 2, "granularity": granularity}
    model = small_sit()
    noise, labels = small_noise()
    expected = sample(enable_cache(model, **settings), noise, labels, num_steps=11)
    cached = graphed(model, **settings)
    for _ in range(2):  # the second run has nothing left to capture
        assert torch.equal(sample(cached, noise, labels, num_steps=11), expected)
        assert captures == ["full", "corrected" if granularity == "module" else "forecast"]


def test_one_graph_of_each_kind_serves_any_number_of_forecast_steps_in_a_row(captures):
    settings = {"cache": "taylor", "full_steps": "0,1,3,6,10,15", "order": 1, "granularity": "module"}
    model = small_sit()
    noise, labels = small_noise()
    expected = sample(enable_cache(model, **settings), noise, labels, num_steps=22)
    assert torch.equal(sample(graphed(model, **settings), noise, labels, num_steps=22), expected)
    assert captures == ["full", "corrections", "corrected"]


def test_every_batch_of_a_guided_run_has_its_own_two(captures):
    settings = {"cache": "newton", "interval": 3, "order": 1, "granularity": "module"}
    model = small_sit()
    noise, labels = small_noise()
    expected = sample(enable_cache(model, **settings), noise, labels, **GUIDED)
    assert torch.equal(sample(graphed(model, **settings), noise, labels, **GUIDED), expected)
    # label alone and both halves; and while their histories differ, each half by itself
    assert captures.count("full") == 2 and captures.count("corrected") <= 3


def test_released_graphs_are_captured_anew(captures):
    model = small_sit()
    noise, labels = small_noise()
    cached = graphed(model, cache="reuse", interval=2, granularity="model")
    for _ in range(2):
        sample(cached, noise, labels, num_steps=4)
        cached.release()
        (functions,) = cached._functions
        assert not (functions["full"]._captured or functions["full"]._features or functions["forecast"]._captured)
    assert captures == ["full", "forecast"] * 2


def test_an_answer_survives_the_next_replay(captures):
    model = small_sit()
    noise, labels = small_noise()
    cached = graphed(model, num_steps=4, cache="reuse", interval=2, granularity="model")
    first = cached(noise, torch.ones(2), labels).prediction
    kept = first.clone()
    cached(noise * 2, torch.full((2,), 0.5), labels)
    assert torch.equal(first, kept)


def test_on_the_cpu_there_are_no_graphs():
    with pytest.raises(UserError, match="the model must be on a GPU for CUDA graphs, got cpu"):
        enable_cache(small_sit()).capture()


@needs_gpu
@pytest.mark.parametrize("granularity", ["module", "block", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_replays_equal_eager_calls(granularity, dtype):
    settings = {"cache": "taylor", "interval": 3, "order": 2, "granularity": granularity}
    model = small_sit().to("cuda", dtype)
    noise, labels = (tensor.cuda() for tensor in small_noise())
    noise = noise.to(dtype)
    expected = sample(enable_cache(model, **settings), noise, labels, **GUIDED)
    cached = enable_cache(model, **settings).capture()
    for _ in range(2):
        torch.testing.assert_close(sample(cached, noise, labels, **GUIDED), expected)


@needs_gpu
def test_on_a_gpu_one_graph_of_each_kind_serves_a_whole_run():
    model = small_sit().cuda()
    noise, labels = (tensor.cuda() for tensor in small_noise())
    cached = enable_cache(model, cache="taylor", interval=3, order=2, granularity="module").capture()
    sample(cached, noise, labels, num_steps=20)
    captured = {name: len(function._captured) for name, function in cached._functions[0].items()}
    assert captured == {"full": 1, "corrections": 0, "corrected": 1}  # two forecast steps in a row: made at once
