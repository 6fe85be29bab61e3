"""The way from settings to a cached model and back, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import FAST, CacheConfig, cache_bytes, check_memory, disable_cache, enable_cache, make_cache
from haste.errors import UserError
from haste.samplers import model_calls, sample


def test_three_lines_around_a_loop_of_ones_own():
    model = small_sit()
    x, y = small_noise()
    fast = enable_cache(model, num_steps=10)
    for step in range(10):
        x = x - fast(x, torch.full((2,), 1 - step / 10), y).velocity / 10
    assert disable_cache(fast) is model and fast.cache_bytes == 0
    assert disable_cache(model) is model
    noise, labels = small_noise()
    torch.testing.assert_close(x, sample(make_cache(model, FAST), noise, labels, num_steps=10), rtol=1e-4, atol=1e-5)


def test_a_loop_that_calls_more_than_once_a_step_hands_over_its_plan():
    model = small_sit()
    x, y = small_noise()
    fast = enable_cache(model, model_calls=model_calls("heun", 4), cache="newton", order=1, interval=2)
    for time in (1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25):  # Heun's second look at a time is the next step's first
        fast(x, torch.full((2,), time), y)
    assert fast.full_steps == [0, 1, 3] and fast.num_full == 5


def test_what_enable_cache_takes():
    model, config = small_sit(), CacheConfig(cache="hermite", order=1)
    given = [
        (enable_cache(model), FAST),
        (enable_cache(model, interval=4), CacheConfig(cache="newton", granularity="model", interval=4, order=2)),
        (enable_cache(model, cache="newton", order=3), CacheConfig(cache="newton", order=3)),
        (enable_cache(model, config), config),
        (enable_cache(model, config, interval=5), CacheConfig(cache="hermite", order=1, interval=5)),
    ]
    for cached, expected in given:
        assert cached.config == expected
    with pytest.raises(UserError, match='cache is "none"; it must name a forecaster'):
        enable_cache(model, CacheConfig())
    with pytest.raises(UserError, match="the model has a cache already; disable_cache it"):
        enable_cache(enable_cache(model))
    with pytest.raises(UserError, match="a run must have one of num_steps, times and model_calls, got several"):
        enable_cache(model, num_steps=3, times=[3, 2, 1])


@pytest.mark.parametrize("granularity", ["module", "block", "model"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_estimate_is_what_a_run_takes(granularity, cfg_scale):
    model = small_sit()
    noise, labels = small_noise(3)
    settings = CacheConfig(cache="taylor", granularity=granularity, interval=3, order=2)
    cached = make_cache(model, settings)
    sample(cached, noise, labels, num_steps=10, cfg_scale=cfg_scale, null=10)
    assert cached.cache_bytes == cache_bytes(model, settings, 3 if cfg_scale == 1 else 6)
    cached.release()
    assert cached.cache_bytes == 0


def test_delta_dit_keeps_one_tensor_and_no_cache_nothing():
    model = small_sit()
    one = 16 * 32 * 4
    assert cache_bytes(model, CacheConfig(cache="delta-dit"), 5) == 5 * one
    assert cache_bytes(model, CacheConfig(), 5) == 0
    assert cache_bytes(model, CacheConfig(cache="delta-dit"), 1, torch.bfloat16) == one // 2


def test_too_little_memory_names_what_would_fit():
    model, settings = small_sit(), CacheConfig(cache="taylor", order=1, interval=1)  # nothing is made ahead of time
    gib = 2**20  # images at once, so that sizes are in GiB: per module 4 · 2 · 2 KiB each
    check_memory(model, settings, gib, free=16 * 2**30)
    with pytest.raises(UserError, match="per module takes 16.0 GiB for 1048576 images at once, and 9.0 GiB are free; "
                       "--granularity model takes 4.0 GiB"):  # fmt: skip
        check_memory(model, settings, gib, free=9 * 2**30)
    with pytest.raises(UserError, match="2.0 GiB are free; 131072 images at once .--per-proc-batch-size. would fit"):
        check_memory(model, settings, gib, free=2 * 2**30)
    with pytest.raises(UserError, match="0.0 GiB are free; not even one image fits"):
        check_memory(model, settings, gib, free=100)
    with pytest.raises(UserError, match="the cache takes 2.0 GiB for 1048576 images at once, .* 524288 images"):
        check_memory(model, CacheConfig(cache="delta-dit"), gib, free=2**30)
    with pytest.raises(UserError, match="per model takes 8.0 GiB for 1048576 images at once, .* 524288 images"):
        settings = CacheConfig(cache="taylor", order=1, granularity="model")
        check_memory(model, settings, gib, guided=True, free=4 * 2**30)


def test_what_is_free_is_asked_of_the_machine():
    check_memory(small_sit(), CacheConfig(cache="taylor"), 2)
    with pytest.raises(UserError, match="GiB are free"):
        check_memory(small_sit(), CacheConfig(cache="taylor"), 2**50)
