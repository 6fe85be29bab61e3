"""The cache of images that are made in parts, held against its definition written out."""

from __future__ import annotations

import copy
from math import prod

import haste
import pytest
import torch
from haste.caching import CacheConfig, CachedParts, cache_bytes, check_memory, disable_cache, enable_cache, make_cache
from haste.caching.config import even_steps
from haste.errors import UserError
from haste.models import build_model
from haste.samplers import BOTH, COND, UNCOND, Solver, sample, time_grid

PARTS, TOKENS, DIM = 4, 4, 4
GROWING = [part / (PARTS - 1) for part in range(PARTS)]
TINY = {"family": "xar", "width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "channels": 1, "grid": 4,
        "patch_size": 2, "entity": "cell", "entity_size": 2, "num_classes": 10}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build_model(TINY).eval()


def velocity(part: int, t: float, branch: str) -> float:
    """Some function of time, of no low order."""
    return (1.5 if branch == "cond" else -0.5) * (t**4 - part * t**3 + t) + part


class TimesEngine:
    """Velocities that depend on part, time and branch alone; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[float], tuple[str, ...]]] = []

    def velocities(self, first, states, times, branches):
        self.calls.append((first, times, branches))
        return [
            torch.cat([torch.full_like(x, velocity(first + number, t, b)) for b in branches])
            for number, (x, t) in enumerate(zip(states, times, strict=True))
        ]

    def finish(self, part, state):
        pass


def run(cache, scales=(0.0,) * PARTS, batch=2, **settings):
    engine = TimesEngine()
    noises = [torch.zeros(batch, TOKENS, DIM, dtype=torch.float64) for _ in range(PARTS)]
    return Solver(**settings).parts(engine, noises, scales, cache), engine


def interpolated(points: list[float], values: list[float], at: float) -> float:
    """Lagrange's polynomial."""
    return sum(
        v * prod((at - q) / (p - q) for q in points if q != p) for p, v in zip(points, values, strict=True)
    )  # fmt: skip


def forecast_run(part: int, steps: int, full: list[int], exact: list[int], order: int, scale: float = 1.0) -> float:
    """Where a part ends by Euler's method; `exact` steps are computed and not kept, as another part needs them."""
    grid, kept, x = time_grid("euler", steps).tolist(), {"cond": [], "uncond": []}, 0.0
    for step in range(steps):
        t, of = grid[step], {}
        for branch, history in kept.items():
            computed = velocity(part, t, branch)
            if step in full:
                history.insert(0, (t, computed))
            taken = history[: order + 1]
            points, values = [time for time, _ in taken], [value for _, value in taken]
            of[branch] = computed if step in (*full, *exact) else interpolated(points, values, t)
        x += (grid[step + 1] - t) * (of["uncond"] + scale * (of["cond"] - of["uncond"]))
    return x


# -- one part after the other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_each_part_has_full_steps_and_a_history_of_its_own(model, order):
    steps = (13, 10, 7, 3)
    cache = make_cache(model, CacheConfig(cache="newton", interval=3, order=order))
    parts, engine = run(cache, part_steps=steps)
    full = [even_steps(count, 3) for count in steps]
    grids = [time_grid("euler", count).tolist() for count in steps]
    called = [(part, [grids[part][step]], COND) for part in range(PARTS) for step in full[part]]
    assert engine.calls == called
    for part, reached in enumerate(parts):
        wanted = forecast_run(part, steps[part], full[part], [], order)
        torch.testing.assert_close(reached, torch.full_like(reached, wanted), rtol=1e-6, atol=1e-6)
    report = cache.report
    begins = (0, 13, 23, 30)
    assert report.full_steps == [begin + step for begin, own in zip(begins, full, strict=True) for step in own]
    assert report.full_calls == len(called) and report.full_calls + report.forecast_calls == sum(steps)
    assert f"{len(called)} of {sum(steps)} steps in full" in str(report)
    assert report.seconds_full > 0 and report.seconds_forecast > 0


@pytest.mark.parametrize("settings", [{"interval": 1}, {"full_steps": "0,1,2,3,4,5"}])
@pytest.mark.parametrize("stagger", [None, 2])
def test_of_full_steps_alone_a_run_is_the_uncached_one(model, settings, stagger):
    cache = make_cache(model, CacheConfig(cache="taylor", order=1, **settings))
    common = {"num_steps": 6, "stagger": stagger, "cfg_scale": 2.0, "null": 10}
    (cached, engine), (plain, other) = run(cache, GROWING, **common), run(None, GROWING, **common)
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True)) and engine.calls == other.calls


@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_guidance(model, guidance):
    cache = make_cache(model, CacheConfig(cache="newton", interval=3, order=1))
    common = {"num_steps": 8, "cfg_scale": 2.5, "null": 10, "guidance": guidance}
    parts, engine = run(cache, GROWING, **common)
    full = even_steps(8, 3)
    for part, reached in enumerate(parts):
        wanted = forecast_run(part, 8, full, [], 1, 1 + 1.5 * GROWING[part])
        torch.testing.assert_close(reached, torch.full_like(reached, wanted), rtol=1e-6, atol=1e-6)
    later = [BOTH] if guidance == "batched" else [COND, UNCOND]
    assert [branches for *_, branches in engine.calls] == [COND] * len(full) + later * (3 * len(full))
    assert cache.report.full_calls == len(engine.calls)


def test_where_guidance_comes_on_a_step_is_full(model):
    """The null half has nothing to be forecast from; the other half keeps its history."""
    cache = make_cache(model, CacheConfig(cache="newton", interval=4, order=1))
    _, engine = run(cache, GROWING, num_steps=10, cfg_scale=2.0, null=10, guidance_high=0.75)
    second = [(times[0], branches) for first, times, branches in engine.calls if first == 1]
    # Full steps 0, 4, 8 of ten; guided from t = 0.7, step 3, on.
    assert second == [(1.0, COND), (pytest.approx(0.7), BOTH), (pytest.approx(0.6), BOTH), (pytest.approx(0.2), BOTH)]


def test_both_calls_of_a_step_of_heun_are_full_or_forecast(model):
    cache = make_cache(model, CacheConfig(cache="newton", interval=2, order=1))
    _, engine = run(cache, num_steps=6, sampler="heun")
    grid = time_grid("heun", 6).tolist()
    expected = [grid[at] for step in (0, 2, 4) for at in (step, step + 1)]
    assert [times[0] for first, times, _ in engine.calls if first == 0] == expected


# -- staggered -------------------------------------------------------------------------------------------------------


def test_staggered_parts_are_computed_up_to_the_last_full_one(model):
    """Each two steps behind: full steps 0, 3, 6 of eight, so they fall into different rounds."""
    cache = make_cache(model, CacheConfig(cache="newton", interval=3, order=1))
    parts, engine = run(cache, num_steps=8, stagger=2)
    full, steps = [0, 3, 6], 8
    called, exact = [], [[] for _ in range(PARTS)]
    for number in range(steps + 2 * (PARTS - 1)):
        own = {part: number - 2 * part for part in range(PARTS) if 0 <= number - 2 * part < steps}
        last = max([part for part, step in own.items() if step in full], default=None)
        if last is not None:
            called.append((min(own), [1 - own[part] / steps for part in own if part <= last], COND))
            for part in own:
                exact[part] += [own[part]] if part <= last and own[part] not in full else []
    assert engine.calls == called and any(exact)
    for part, reached in enumerate(parts):
        wanted = forecast_run(part, steps, full, exact[part], 1)
        torch.testing.assert_close(reached, torch.full_like(reached, wanted), rtol=1e-6, atol=1e-6)
    assert len(cache.report.full_steps) == len(called)


def test_parts_that_are_full_together_cost_no_more_calls(model):
    """Stagger 4 and full steps at distances of 4: nothing is computed that is not kept."""
    cache = make_cache(model, CacheConfig(cache="newton", interval=4, order=1))
    _, engine = run(cache, num_steps=10, stagger=4)
    assert len(engine.calls) == 6 and cache.report.full_steps == [0, 4, 8, 12, 16, 20]
    assert "of whose 40 steps 12 were evaluated" in cache.report.cached


# -- memory, copies, the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 2])
def test_its_memory_is_what_was_said_before(model, order):
    config = CacheConfig(cache="taylor" if order else "reuse", order=order)
    cache = make_cache(model, config)
    assert cache.cache_bytes == 0
    settings = {"num_steps": 8, "cfg_scale": 2.0, "null": 10}
    run(cache, (1.0,) * PARTS, batch=3, **settings)
    expected = cache_bytes(model, config, 6, torch.float64, input_shape=(1, 8, 8))
    assert cache.cache_bytes == expected == (order + 1) * 6 * 64 * 8
    assert cache.report.mib == expected / 2**20
    cache.release()
    assert cache.cache_bytes == 0
    with pytest.raises(UserError, match="images at once"):
        check_memory(model, config, 3, guided=True, free=100, input_shape=(1, 8, 8))


def test_of_two_runs_the_second_knows_nothing_of_the_first(model):
    cache = make_cache(model, CacheConfig(cache="newton", interval=3, order=1))
    first, _ = run(cache, num_steps=8)
    run(cache, num_steps=5, batch=3)
    copied = copy.deepcopy(cache)
    for own in (cache, copied):
        again, engine = run(own, num_steps=8)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and len(engine.calls) == 12


# -- settings --------------------------------------------------------------------------------------------------------


def test_what_settings_mean_in_parts():
    assert CacheConfig(cache="taylor").in_parts().granularity == "output"
    assert CacheConfig(cache="taylor").in_parts().spacing == "even"
    assert CacheConfig(cache="taylor", first_enhance=1).in_parts().spacing == "interval"
    assert CacheConfig(cache="taylor", full_steps="0,2").in_parts().spacing == "interval"
    assert CacheConfig().in_parts() == CacheConfig()


def test_enable_cache_takes_a_model_whose_images_are_made_in_parts(model):
    cached = enable_cache(model)
    assert isinstance(cached, CachedParts) and cached.config.granularity == "output"
    assert (cached.config.cache, cached.config.interval, cached.config.order) == ("newton", 6, 2)
    _, engine = run(cached, num_steps=8)  # the interval that nobody chose shrinks to two
    assert len(engine.calls) == 4 * len(even_steps(8, 2))
    assert disable_cache(cached) is model
    with haste.cached(model, cache="taylor", interval=2) as cached:
        assert cached.config.spacing == "even"


def test_the_sampler_of_whole_images_takes_it_too(model):
    noise, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1])
    settings = {"num_steps": 9, "cfg_scale": 2.0, "null": 10}
    plain = sample(model, noise, labels, **settings)
    with haste.cached(model, cache="newton", interval=3, order=1) as cached:
        reached = sample(cached, noise, labels, **settings)
        assert (cached.report.full_calls, cached.report.forecast_calls) == (4 * len(even_steps(9, 3)), 36 - 16)
    assert reached.shape == noise.shape and not torch.equal(reached, plain)
    with haste.cached(model, cache="newton", interval=1) as cached:
        assert torch.equal(sample(cached, noise, labels, **settings), plain)


def test_an_order_that_a_shorter_part_does_not_allow_shrinks(model):
    cache = make_cache(model, CacheConfig(cache="newton", interval=3, order=3))
    steps = (11, 3, 4, 11)
    parts, _ = run(cache, part_steps=steps)
    wanted = forecast_run(2, 4, even_steps(4, 3), [], 3)
    torch.testing.assert_close(parts[2], torch.full_like(parts[2], wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"cache": "delta-dit"}, "--cache must be"),
        ({"cache": "taylor", "granularity": "model"}, "granularity must be output"),
        ({"cache": "taylor", "granularity": "module"}, "granularity must be output"),
        ({"granularity": "block"}, "granularity must be output"),
        ({"error_threshold": 0.1}, "--error-threshold must be"),
        ({"num_steps": 10}, "num_steps"),
    ],
)
def test_settings_that_have_no_meaning_in_parts(model, settings, named):
    with pytest.raises(UserError, match=named):
        enable_cache(model, **settings)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"full_steps": "0,4"}, "--full-steps must be numbers from 0 to 3"),
        ({"interval": 5}, "--interval must be at most the number of steps, 4"),
        ({"first_enhance": 5}, "--first-enhance must be at most the number of steps, 4"),
        ({"interval": 3, "order": 4}, "--order must be at most 2"),
    ],
)
def test_settings_that_the_steps_of_a_part_do_not_allow(model, settings, named):
    cache = make_cache(model, CacheConfig(cache="taylor", **settings))
    with pytest.raises(UserError, match=named):
        run(cache, part_steps=(8, 8, 4, 8))


def test_it_is_not_called_and_not_trained(model):
    cache = make_cache(model, CacheConfig(cache="taylor"))
    with pytest.raises(UserError, match="haste.sample"):
        cache(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    training = make_cache(build_model(TINY).train(), CacheConfig(cache="taylor"))
    with pytest.raises(ValueError, match="eval mode"):
        run(training, num_steps=4)
