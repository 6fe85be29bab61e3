"""Caches around a DiT, which predicts noise and variance at times 999 to 0: against TaylorSeer and Δ-DiT as published,
written out plainly with DDIM in double precision, and in loops of all kinds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import haste.cuda_graphs
import pytest
import torch
from caching_models import small_dit
from haste.caching import CacheConfig, CachedModel, cache_bytes, check_memory, cuda_graphs, enable_cache
from haste.errors import UserError
from haste.samplers import initial_noise, sample, time_grid
from torch import Tensor

STEPS, NULL, SCALE, GUIDED = 50, 10, 1.5, 3  # guidance of the first three channels, as DiT's own sampler has it
LABELS = torch.arange(2)
TIMES = [round(999 * (1 - step / 49)) for step in range(STEPS)]
ALL = ("module", "block", "model", "output")


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return initial_noise((2, 4, 8, 8), torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def at(t: int, x: Tensor) -> Tensor:
    """Times in float64: their frequencies are computed in the type of the times, but at least in float32."""
    return torch.full((len(x),), t, dtype=x.dtype)


# ---- as published ----


class Published:
    """A DiT of whose calls those in `full` are computed and the others forecast: `feature` has the recurrence."""

    def __init__(self, model, full: list[int], order: int, granularity: str = "module", cache: str = "taylor") -> None:
        self.model, self.full, self.order, self.granularity, self.cache = model, full, order, granularity, cache
        self.step = -1
        self.terms: dict[object, list[Tensor]] = {}  # T_0, T_1, ...
        self.held: dict[object, list[tuple[int, Tensor]]] = {}  # for newton: the time and the feature, newest first

    def __call__(self, x: Tensor, t: int, y: Tensor) -> Tensor:
        self.step, self.time = self.step + 1, t
        times = at(t, x)
        if self.granularity == "output":
            return self.feature("output", lambda: self.model(x, times, y).prediction)
        tokens, c = self.model.embed(x, times, y)
        entering = tokens
        if self.granularity == "module":
            return self.model.finish(self.by_module(tokens, c), c)

        def run() -> Tensor:
            leaving = entering
            for block in self.model.blocks:
                leaving = block(leaving, c)[0]
            return leaving - entering if self.granularity == "block" else leaving

        feature = self.feature("blocks", run)
        return self.model.finish(entering + feature if self.granularity == "block" else feature, c)

    def by_module(self, tokens: Tensor, c: Tensor) -> Tensor:
        for number, block in enumerate(self.model.blocks):
            shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in block.adaLN_modulation(c).chunk(6, dim=1))
            normed = block.norm1(tokens) * (1 + scale) + shift
            tokens = tokens + gate * self.feature((number, 1), lambda b=block, h=normed: b.attn(h)[0])
            normed = block.norm2(tokens) * (1 + scale2) + shift2
            tokens = tokens + gate2 * self.feature((number, 2), lambda b=block, h=normed: b.mlp(h))
        return tokens

    def feature(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        if self.cache == "newton":
            return self.interpolated(key, compute)
        if self.step in self.full:
            done = [step for step in self.full if step <= self.step]
            old, new = self.terms.get(key, []), [compute()]
            for i in range(min(self.order, len(old))):
                new.append((new[i] - old[i]) / (done[-1] - done[-2]))
            self.terms[key] = new
            return new[0]
        x = self.step - max(step for step in self.full if step < self.step)
        return sum(term * x**i / math.factorial(i) for i, term in enumerate(self.terms[key]))

    def interpolated(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        held = self.held.setdefault(key, [])
        if self.step in self.full:
            held.insert(0, (self.time, compute()))
            return held[0][1]
        known = held[: self.order + 1]
        return sum(
            value * math.prod((self.time - other) / (time - other) for other, _ in known if other != time)
            for time, value in known
        )


def delta_dit(model, full: list[int], count: int, gate: int) -> Callable[[Tensor, int, Tensor], Tensor]:
    """Δ-DiT: of a full step the change by a group of blocks, the rear ones while more than `gate` steps remain."""
    kept: dict[str, Tensor] = {}
    steps = iter(range(STEPS))

    def call(x: Tensor, t: int, y: Tensor) -> Tensor:
        step, depth = next(steps), len(model.blocks)
        first = depth - count if STEPS - step > gate else 0
        tokens, c = model.embed(x, at(t, x), y)
        for block in model.blocks[:first]:
            tokens = block(tokens, c)[0]
        if step in full:
            entering = tokens
            for block in model.blocks[first : first + count]:
                tokens = block(tokens, c)[0]
            kept["change"] = tokens - entering
        else:
            tokens = tokens + kept["change"]
        for block in model.blocks[first + count :]:
            tokens = block(tokens, c)[0]
        return model.finish(tokens, c)

    return call


def ddim(call: Callable[[Tensor, int, Tensor], Tensor]) -> Iterator[Tensor]:
    """DDIM of 50 steps from 999 to 0 with guidance: what the model predicts in each, (4, 8, 8, 8), cond then uncond."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    x, y = noise(torch.float64), torch.cat([LABELS, torch.full_like(LABELS, NULL)])
    for t, t_next in pairwise([*TIMES, None]):
        prediction = call(torch.cat([x, x]), t, y)
        yield prediction
        cond, uncond = prediction[:, :4].chunk(2)
        eps = torch.cat([(uncond + SCALE * (cond - uncond))[:, :GUIDED], cond[:, GUIDED:]], dim=1)
        now, then = alpha_bar[t], 1.0 if t_next is None else alpha_bar[t_next].item()
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then**0.5 * clean + (1 - then) ** 0.5 * eps


def run(model, dtype: torch.dtype = torch.float64, **settings) -> Tensor:
    """haste's sampler in the same setting."""
    settings = {"num_steps": STEPS, "cfg_scale": SCALE, "null": NULL, "guided_channels": GUIDED, **settings}
    return sample(model, noise(dtype), LABELS, **settings)


def predictions(cached: CachedModel, **settings) -> list[Tensor]:
    """What a cached model returns in each call of a run."""
    seen: list[Tensor] = []
    forward = cached.forward

    def watching(x, t, y):
        output = forward(x, t, y)
        seen.append(output.prediction)
        return output

    cached.forward = watching
    run(cached, **settings)
    return seen


@torch.no_grad()
def assert_as_published(cached: CachedModel, published: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    """In every step, to what weights in float32 leave; and not as without a cache."""
    expected, got = list(ddim(published)), predictions(cached)
    assert len(expected) == len(got) == STEPS
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    assert max(errors) < 1e-6
    model = cached.model
    uncached = list(ddim(lambda x, t, y: model(x, at(t, x), y).prediction))
    assert (expected[-1] - uncached[-1]).norm() > 1e-3 * uncached[-1].norm()


def listed(interval: int, first: int = 2) -> list[int]:
    return [*range(first), *range(first - 1 + interval, STEPS, interval)]


@pytest.mark.parametrize("interval, order, count", [(3, 3, 18), (4, 4, 14), (5, 4, 11), (6, 1, 10), (6, 4, 10)])
def test_taylorseer_under_ddim_is_the_published_recurrence(interval, order, count):
    model = small_dit().double()
    cached = enable_cache(model, cache="taylor", interval=interval, order=order)
    assert_as_published(cached, Published(model, listed(interval), order))
    assert cached.full_steps == listed(interval) and len(cached.full_steps) == count


@pytest.mark.parametrize("cache, order", [("taylor", 2), ("newton", 2), ("reuse", 0)])
@pytest.mark.parametrize("granularity", ALL)
def test_every_granularity_is_that_forecast_of_what_it_caches(granularity, cache, order):
    model = small_dit().double()
    cached = enable_cache(model, cache=cache, order=order, interval=4, granularity=granularity)
    kind = "newton" if cache == "newton" else "taylor"
    assert_as_published(cached, Published(model, listed(4), order, granularity, kind))


def test_the_default_is_newton_per_model_at_even_distances():
    model = small_dit().double()
    full = [0, 6, 12, 18, 24, 30, 36, 42, 48]
    cached = enable_cache(model)
    assert_as_published(cached, Published(model, full, 2, "model", "newton"))
    assert cached.full_steps == full


def test_delta_dit_under_ddim():
    """A step at which the group changes is full: step 20, from where 30 steps remain."""
    model = small_dit(depth=4).double()
    full = [*range(0, 20, 3), *range(20, 50, 3)]
    cached = enable_cache(model, cache="delta-dit", interval=3, gate=30)
    assert_as_published(cached, delta_dit(model, full, count=3, gate=30))
    assert cached.full_steps == full


@pytest.mark.parametrize("granularity", ["module", "block", "delta-dit"])
def test_rotary_positions_rms_norms_and_swiglu_are_forecast_as_the_rest(granularity):
    parts = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}
    model = small_dit(depth=4, **parts).double()
    if granularity == "delta-dit":
        full = [*range(0, 20, 3), *range(20, 50, 3)]
        cached = enable_cache(model, cache="delta-dit", interval=3, gate=30)
        assert_as_published(cached, delta_dit(model, full, count=3, gate=30))
    else:
        cached = enable_cache(model, cache="taylor", interval=4, order=2, granularity=granularity)
        assert_as_published(cached, Published(model, listed(4), 2, granularity))
    plain = enable_cache(small_dit(depth=4).double(), **dataclasses.asdict(cached.config))
    sizes = [cache_bytes(each.model, each.config, 2) for each in (cached, plain)]
    assert sizes[0] == sizes[1] > 0  # features are tokens, whatever is between


# ---- the samplers, and guidance ----


@pytest.mark.parametrize("granularity, tolerance", [("module", 1e-5), ("block", 0), ("model", 0), ("output", 0)])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_interval_one_is_the_model(sampler, granularity, tolerance):
    model = small_dit()
    own = {"num_steps": 5, "sampler": sampler, "timestep_spacing": "leading", "guidance_low": 0.5}
    images = [
        run(m, torch.float32, **own, generator=torch.Generator().manual_seed(2))
        for m in (model, enable_cache(model, cache="taylor", interval=1, order=2, granularity=granularity))
    ]
    torch.testing.assert_close(images[0], images[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("granularity", ALL)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_in_one_batch_or_two_on_an_interval(sampler, granularity):
    """It begins late, so that the halves have different histories, and ends early."""
    model, images = small_dit().double(), []
    for guidance in ("batched", "separate"):
        cached = enable_cache(model, cache="taylor", interval=3, order=2, granularity=granularity)
        interval = {"guidance_low": 0.2, "guidance_high": 0.7, "guidance": guidance}
        images.append(run(cached, num_steps=15, sampler=sampler, **interval,
                          generator=torch.Generator().manual_seed(2)))  # fmt: skip
        assert cached.report.forecast_calls > 0
    torch.testing.assert_close(images[0], images[1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ALL)
def test_ddpm_reads_the_variance_of_a_forecast(granularity):
    """From the states of a run, what is predicted of each is the published forecast, noise and variance."""
    model = small_dit().double()
    cached = enable_cache(model, cache="taylor", interval=4, order=1, granularity=granularity)
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    forward = cached.forward

    def watching(x, t, y):
        output = forward(x, t, y)
        calls.append((x, t, y, output.prediction))
        return output

    cached.forward = watching
    run(cached, sampler="ddpm", generator=torch.Generator().manual_seed(2))
    published = Published(model, listed(4), 1, granularity)
    for x, t, y, prediction in calls:
        torch.testing.assert_close(prediction, published(x, int(t[0]), y), rtol=1e-6, atol=1e-6)
    assert cached.report.full_calls == 14 and prediction.shape == (4, 8, 8, 8)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_error_bound_goes_by_the_noise(sampler):
    """Not by the variance, which DDIM does not read."""
    model = small_dit().double()
    threshold = {"cache": "newton", "order": 1, "error_threshold": 0.02, "granularity": "model"}
    steps = []
    for factor in (1.0, 100.0):  # of all that the variance is made of
        rows = model.final_layer.linear.weight.view(2, 2, 8, -1)[:, :, 4:]
        with torch.no_grad():
            rows.mul_(factor)
            model.final_layer.linear.bias.view(2, 2, 8)[:, :, 4:].zero_()
        cached = enable_cache(model, **threshold)
        run(cached, sampler="ddim")
        steps.append(cached.full_steps)
    assert steps[0] == steps[1] and 2 < len(steps[0]) < STEPS


# ---- loops of one's own ----


SHORT = TIMES[::5]


def loop(model, times: Callable, dtype: torch.dtype = torch.float32) -> Tensor:
    """Calls at ten times, as x falls with them. times: makes of a number what the model is given."""
    x = noise(dtype)
    return torch.stack([model(x * (0.5 + t / 1000), times(t), LABELS)[0].double() for t in SHORT])


KINDS = {
    "int64": lambda t: torch.full((2,), t),
    "int32": lambda t: torch.full((2,), t, dtype=torch.int32),
    "float32": lambda t: torch.full((2,), float(t)),
    "float64": lambda t: torch.full((2,), t, dtype=torch.float64),
    "number": lambda t: t,
}


@torch.no_grad()
@pytest.mark.parametrize("granularity", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [{"num_steps": 10}, {"times": SHORT}], ids=["num_steps", "times"])
def test_times_may_have_any_type_that_holds_them(plan, dtype, granularity):
    model = small_dit().to(dtype)
    cached = enable_cache(model, cache="newton", interval=3, order=2, granularity=granularity, **plan)
    first = loop(cached, KINDS["int64"], dtype)
    assert cached.full_steps == [0, 1, 4, 7]
    for kind in ("int32", "float32"):
        assert torch.equal(loop(cached, KINDS[kind], dtype), first)  # the first time again begins the next run
        assert cached.full_steps == [0, 1, 4, 7]
    # Frequencies in float64 round otherwise, and so do the forecasts of several known times at once.
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for kind in ("float64", "number"):
        torch.testing.assert_close(loop(cached, KINDS[kind], dtype), first, **close)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ALL)
@pytest.mark.parametrize("plan", [{"num_steps": 10}, {"times": [1 - step / 10 for step in range(10)]}])
def test_times_of_other_models_are_refused(plan, granularity):
    fast = enable_cache(small_dit(), cache="taylor", interval=2, order=1, granularity=granularity, **plan)
    with pytest.raises(ValueError, match=r"^t must be whole numbers from 0 to 999, the times of DiT, got 0\.9$"):
        for step in range(2):
            fast(noise(), torch.full((2,), 1 - step / 10), LABELS)


@torch.no_grad()
@pytest.mark.parametrize("time, given", [(1000, "1000"), (-1, "-1"), (3.5, "3.5")])
def test_so_are_those_outside_and_those_between(time, given):
    for granularity in ALL:
        fast = enable_cache(small_dit(), cache="reuse", interval=2, granularity=granularity, num_steps=2)
        with pytest.raises(ValueError, match=rf"^t must be whole numbers from 0 to 999, .* got {given}$"):
            fast(noise(), time, LABELS)


@torch.no_grad()
def test_times_in_bfloat16_are_refused_as_it_lacks_999():
    model = small_dit().bfloat16()
    for called in (model, enable_cache(model, cache="reuse", interval=2, num_steps=2)):
        with pytest.raises(ValueError, match="^t must be int64 or float32, as bfloat16 has not all whole numbers"):
            called(noise(torch.bfloat16), torch.full((2,), 980, dtype=torch.bfloat16), LABELS)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["module", "model", "output"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_around_schedulers_of_diffusers(name, granularity):
    diffusers = pytest.importorskip("diffusers")
    model = small_dit()

    def images(fast) -> Tensor:
        scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        scheduler.set_timesteps(20)
        x = noise()
        for t in scheduler.timesteps:
            prediction = fast(x, t.expand(2), LABELS).prediction
            x = scheduler.step(prediction[:, :4], t, x).prev_sample
        return x

    settings = {"cache": "newton", "interval": 3, "order": 1, "granularity": granularity}
    cached = enable_cache(model, num_steps=20, **settings)
    full, fast = images(model), images(cached)
    assert cached.full_steps == [0, 1, 4, 7, 10, 13, 16, 19]
    assert torch.equal(images(cached), fast)  # the next run
    assert (fast - full).norm() > 1e-3 * full.norm()
    every = enable_cache(model, num_steps=20, **{**settings, "interval": 1})
    torch.testing.assert_close(images(every), full, rtol=1e-4, atol=1e-4)


# ---- memory, CUDA graphs, compilation ----


@pytest.mark.parametrize("granularity", ALL)
def test_as_much_is_announced_as_is_held(granularity):
    model = small_dit()
    config = CacheConfig(cache="taylor", granularity=granularity, interval=4, order=2)
    cached = enable_cache(model, config)
    run(cached, torch.float32)
    assert cached.cache_bytes == cache_bytes(model, config, 4, input_shape=(4, 8, 8))
    if granularity == "output":  # noise and variance, of three full steps
        assert cached.cache_bytes == 3 * 4 * 8 * 8 * 8 * 4
        with pytest.raises(UserError, match=r"1 images at once \(--per-proc-batch-size\) would fit"):
            check_memory(model, config, 2, guided=True, free=cached.cache_bytes - 1, input_shape=(4, 8, 8))


@pytest.mark.parametrize("granularity", ALL)
def test_cuda_graphs_with_a_stand_in_on_the_host(granularity, monkeypatch):
    def stand_in(function, inputs):
        output = function(*inputs)

        def replay():
            for kept, new in zip(output, function(*inputs), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)

        return replay, output

    monkeypatch.setattr(haste.cuda_graphs, "capture", stand_in)
    model = small_dit()
    settings = {"cache": "taylor", "interval": 3, "order": 2, "granularity": granularity}
    own = {"num_steps": 12, "guidance_low": 0.3, "guidance_high": 0.8}
    expected = run(enable_cache(model, **settings), torch.float32, **own)
    cached = enable_cache(model, **settings)
    (functions,) = cached._functions
    cached._functions = [{name: cuda_graphs.GRAPHED[name](function) for name, function in functions.items()}]
    for _ in range(2):
        assert torch.equal(run(cached, torch.float32, **own), expected)


@pytest.mark.parametrize("granularity", ["module", "output"])
def test_compiled_without_a_graph_break_it_samples_the_same(granularity):
    model = small_dit(depth=1)
    settings = {"cache": "newton", "interval": 3, "order": 1, "granularity": granularity}
    expected = run(enable_cache(model, **settings), torch.float32, num_steps=7)
    compiled = enable_cache(model, **settings).compile(backend="eager")
    torch.testing.assert_close(run(compiled, torch.float32, num_steps=7), expected, rtol=1e-4, atol=1e-4)


def test_the_times_here_are_those_of_the_sampler():
    assert time_grid("ddim", STEPS)[:-1].tolist() == TIMES
