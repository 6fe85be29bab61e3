from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import CacheConfig, cache_bytes, check_memory, make_cache
from haste.errors import UserError
from haste.samplers import sample


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
