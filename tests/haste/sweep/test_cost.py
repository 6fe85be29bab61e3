from __future__ import annotations

import pytest
from digits_run import SHAPE, write_run
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler, load_checkpoint
from haste.sweep.measure import count_cost, count_flops, time_run


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_checkpoint(write_run(tmp_path_factory.mktemp("exps"), steps=(4,)))


def products_of_a_full_evaluation() -> tuple[int, int]:
    """FLOPs of the matrix products of one evaluation of one image: outside the blocks, and in them."""
    width, depth, patch = SHAPE["hidden_size"], SHAPE["depth"], SHAPE["patch_size"] ** 2 * SHAPE["in_channels"]
    tokens = (SHAPE["input_size"] // SHAPE["patch_size"]) ** 2
    embedding = tokens * patch * width + 256 * width + width * width
    final = width * 2 * width + tokens * width * patch
    modulation = width * 6 * width
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    mlp = 2 * tokens * width * 4 * width
    return 2 * (embedding + final), 2 * depth * (modulation + attention + mlp)


def test_flops_are_those_of_every_matrix_product_attentions_included(loaded):
    outside, inside = products_of_a_full_evaluation()
    for settings, evaluations in ((SamplingConfig(num_steps=3), 3), (SamplingConfig(num_steps=3, heun=True), 5)):
        assert count_flops(Sampler(loaded, settings)) == evaluations * (outside + inside)
    guided = SamplingConfig(num_steps=3, cfg_scale=2.0)
    assert count_flops(Sampler(loaded, guided)) == 2 * 3 * (outside + inside)


def test_a_cached_run_costs_its_full_steps_and_little_else(loaded):
    outside, inside = products_of_a_full_evaluation()
    settings = SamplingConfig(num_steps=10, cache="taylor", granularity="model", interval=4, order=1)
    cost = count_cost(Sampler(loaded, settings), batch=3)
    assert (cost["calls"], cost["full_calls"]) == (10, 4)  # 0, 1, 5, 9
    assert 4 * (outside + inside) < cost["flops"] <= 10 * outside + 4 * inside
    tokens = 3 * 16 * SHAPE["hidden_size"]
    assert cost["cache_bytes"] == 2 * tokens * 4  # two snapshots, float32
    assert cost["peak_bytes"] is None or cost["peak_bytes"] >= 0


def test_a_full_run_has_no_cache(loaded):
    cost = count_cost(Sampler(loaded, SamplingConfig(num_steps=3)), batch=3)
    assert (cost["calls"], cost["full_calls"], cost["cache_bytes"]) == (3, 3, 0)


def test_only_the_model_and_the_sampler_are_timed(loaded, monkeypatch):
    timed = []
    monkeypatch.setattr(Sampler, "run", lambda self, start: timed.append(len(start.labels)))
    monkeypatch.setattr(Sampler, "sample", None)
    assert time_run(Sampler(loaded, SamplingConfig(num_steps=3)), batch=5) > 0
    assert timed == [5]
