"""xAR's engine: a golden run, and others against loops without any cache, written from the paper."""

from __future__ import annotations

from itertools import pairwise

import haste
import pytest
import torch
from golden import golden_model, read_golden
from haste.errors import UserError
from haste.models import XAR, build_model
from haste.models.xar_costs import cache_bytes, count_flops
from haste.models.xar_modulations import modulation_bytes
from haste.models.xar_sampling import PartSampler, Replays, guidance_scales, sample_parts
from haste.samplers import Solver, sample
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

TINY = {"width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 2, "channels": 3, "grid": 8, "num_classes": 10}
LAYOUTS = [("cell", 4), ("cell", 8), ("token", None), ("subsample", 2), ("scale", 2), ("image", None)]
CLASSES = torch.tensor([3, 7, 3])
NULL = 10


# ---- models ----


def tiny(dtype: torch.dtype = torch.float64, **changes) -> XAR:
    torch.manual_seed(0)
    model = build_model({"family": "xar", **TINY, **changes}).to(dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    return model


def noise_of(model: XAR, batch: int = len(CLASSES), seed: int = 1) -> Tensor:
    """(batch, N, values), in the model's type."""
    shape = (batch, model.entities.total, model.z_proj.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(model.dtype)


# ---- loops without a cache ----


def training_forward(model: XAR, parts: list[Tensor], times: list[float], y: Tensor) -> list[Tensor]:
    """The velocities of parts 0, 1, ... by the forward of training; places behind them hold anything, unseen."""
    rest = model.entities.total - sum(part.shape[1] for part in parts)
    behind = torch.full((len(y), rest, parts[0].shape[2]), 7.0, dtype=model.dtype)
    t = torch.tensor([*times, *[0.5] * (model.entities.count - len(times))]).expand(len(y), -1)
    tokens = torch.cat([*(part.to(model.dtype) for part in parts), behind], dim=1)
    return list(model(tokens, t, y).prediction.split(model.entities.sizes, dim=1))


def guided_velocities(model, parts, times, scales) -> list[Tensor]:
    """v_u + w·(v_c − v_u) of each part, with doubled rows."""
    y = torch.cat([CLASSES[: len(parts[0])], torch.full((len(parts[0]),), NULL)])
    both = training_forward(model, [torch.cat([part, part]) for part in parts], times, y)
    pairs = [v.double().chunk(2) for v in both[: len(parts)]]
    return [null + w * (cond - null) for (cond, null), w in zip(pairs, scales, strict=True)]


def naive_sde(model: XAR, noise: Tensor, step_noise: list[Tensor], steps: int, cfg: float, low=0.0, high=1.0) -> Tensor:
    """Section 3.3 of the paper: finished parts at t = 0 in front, all of them in every evaluation."""
    entities, kicks = model.entities, iter(step_noise)
    grid = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    done: list[Tensor] = []
    for k, x in enumerate(noise.double().split(entities.sizes, dim=1)):
        w = 1 + (cfg - 1) * (k / (entities.count - 1) if entities.count > 1 else 1)
        for step, (t, after) in enumerate(pairwise(grid)):
            times, scale = [0.0] * k + [t], w if low <= t <= high else 1.0
            v = guided_velocities(model, [*done, x], times, [1.0] * k + [scale])[k]
            x = x + ((2 - t) * v + x) * (after - t)
            if step < steps - 1:
                x = x + (2 * t) ** 0.5 * (t - after) ** 0.5 * next(kicks).double()
        done.append(x.to(noise.dtype))
    return torch.cat(done, dim=1)


def naive_staggered(model: XAR, noise: Tensor, steps: int, stagger: int, cfg: float) -> Tensor:
    """Euler's method, each part `stagger` steps behind the one before it, all under the mask of training."""
    entities = model.entities
    parts = list(noise.double().split(entities.sizes, dim=1))
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    scales = [1 + (cfg - 1) * k / (entities.count - 1) for k in range(entities.count)]
    for number in range(steps + stagger * (entities.count - 1)):
        at = [min(number - k * stagger, steps) for k in range(entities.count) if number >= k * stagger]
        given = [part.to(noise.dtype) for part in parts[: len(at)]]
        velocities = guided_velocities(model, given, [grid[i] for i in at], scales[: len(at)])
        for k, i in enumerate(at):
            if i < steps:
                parts[k] = parts[k] + (grid[i + 1] - grid[i]) * velocities[k]
    return torch.cat(parts, dim=1)


def step_noise_of(model: XAR, steps: int, batch: int = len(CLASSES)) -> list[Tensor]:
    """In the public order: part 0's steps but the last, then part 1's, and so on."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, size, model.z_proj.in_features) for size in model.entities.sizes for _ in range(steps - 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# ---- runs of the engine ----


def sequence(model: XAR, noise: Tensor, solve: Solver, **engine) -> Tensor:
    """All parts that a solver makes, those in front of the image's included, (B, N, values)."""
    scales = guidance_scales(model.entities.count)
    null = None if solve.cfg_scale == 1 else NULL
    sampler = PartSampler(model, CLASSES[: len(noise)], null, solve.times(scales), **engine)
    return torch.cat(solve.parts(sampler, noise.split(model.entities.sizes, dim=1), scales), dim=1)


def assert_equal(ours: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=atol)


# ---- the public code's run ----


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_golden("xar_sample_sde.npz")


@pytest.mark.parametrize("separate", [False, True])
def test_every_velocity_of_a_golden_run(golden, separate):
    model = golden_model("xar", torch.float64)
    engine = PartSampler(model, golden["labels"], 1000, golden["times"].tolist())
    branches = [("cond",), ("uncond",)] if separate else [("cond", "uncond")]
    grid = [*torch.linspace(1, 0.04, 5, dtype=torch.float64).tolist(), 0.0]
    for k, x in enumerate(golden["initial_noise"].unbind(1)):
        for step, (t, after) in enumerate(pairwise(grid)):
            found = torch.cat([engine.velocities(k, [x], [t], names)[0] for names in branches])
            assert_equal(found[:, ::4], golden["velocity"][k, step])
            x = x + ((2 - t) * found[: len(x)] + x) * (after - t)
            if after:
                x = x + (2 * t * (t - after)) ** 0.5 * golden["step_noise"][k, step]
        engine.finish(k, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("as_images", [False, True])
def test_latents_of_a_golden_run(golden, dtype, tolerance, as_images):
    model = golden_model("xar", dtype)
    noise = golden["initial_noise"].flatten(1, 2).to(dtype)
    noise = model.entities.join(noise) if as_images else noise
    solve = Solver(sampler="euler-maruyama", num_steps=5, step_noise=golden["step_noise"].flatten(0, 1))
    latents = sample_parts(model, noise, golden["labels"], solve)
    assert latents.dtype == dtype and latents.shape == (2, 16, 16, 16)
    assert_equal(latents, golden["latents"], tolerance)
    if dtype == torch.float32:
        assert_equal(latents, golden["float32_latents"], tolerance)


# ---- against loops without a cache ----


@pytest.mark.parametrize("mode", ["batched", "separate"])
@pytest.mark.parametrize(("entity", "size"), LAYOUTS)
def test_guided_runs_are_those_without_a_cache(entity, size, mode):
    model = tiny(entity=entity, entity_size=size, grid=4 if entity == "token" else 8)
    noise, kicks = noise_of(model), step_noise_of(model, 3)
    solve = Solver(sampler="euler-maruyama", num_steps=3, step_noise=kicks, cfg_scale=2.7, null=NULL, guidance=mode)
    assert_equal(sequence(model, noise, solve), naive_sde(model, noise, kicks, 3, 2.7))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.3, 0.6), (0.9, 1.0), (0.8, 0.9)])
@pytest.mark.parametrize("mode", ["batched", "separate"])
def test_guidance_in_an_interval(low, high, mode):
    model = tiny(entity_size=4)
    noise, kicks = noise_of(model), step_noise_of(model, 4)
    interval = {"guidance_low": low, "guidance_high": high, "guidance": mode}
    solve = Solver(sampler="euler-maruyama", num_steps=4, step_noise=kicks, cfg_scale=2.0, null=NULL, **interval)
    assert_equal(sequence(model, noise, solve), naive_sde(model, noise, kicks, 4, 2.0, low, high))


@pytest.mark.parametrize("stagger", [0, 1, 2, 4])
@pytest.mark.parametrize(("entity", "size"), [("cell", 4), ("scale", 2)])
def test_staggered_runs_are_those_of_the_forward_of_training(entity, size, stagger):
    model = tiny(entity=entity, entity_size=size)
    noise = noise_of(model)
    solve = Solver(num_steps=4, stagger=stagger, cfg_scale=2.7, null=NULL)
    assert_equal(sequence(model, noise, solve), naive_staggered(model, noise, 4, stagger, 2.7))


@pytest.mark.parametrize("stagger", [None, 1])
def test_one_image_is_the_same_as_in_a_batch(stagger):
    model = tiny()
    noise = noise_of(model)
    solve = Solver(num_steps=3, stagger=stagger, cfg_scale=2.0, null=NULL)
    assert_equal(sequence(model, noise[:1], solve), sequence(model, noise, solve)[:1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("stagger", [None, 2])
def test_other_types(dtype, tolerance, stagger):
    model = tiny(dtype)
    noise = noise_of(model)
    solve = Solver(num_steps=4, stagger=stagger, cfg_scale=2.0, null=NULL)
    ours = sequence(model, noise, solve)
    assert ours.dtype == dtype
    wide = sequence(model.double(), noise.double(), solve)
    assert (ours.double() - wide).abs().max() <= tolerance * wide.abs().max()


def test_attention_step_by_step_gives_the_same():
    noise, solve = noise_of(tiny()), Solver(num_steps=3, stagger=1, cfg_scale=2.0, null=NULL)
    assert_equal(sequence(tiny(fused_attn=False), noise, solve), sequence(tiny(), noise, solve))


# ---- modulations ----


@pytest.mark.parametrize("stagger", [None, 1])
def test_modulations_that_do_not_fit_are_computed_in_every_evaluation(stagger, monkeypatch):
    model = tiny()
    noise = noise_of(model)
    solve = Solver(num_steps=4, stagger=stagger, cfg_scale=2.0, null=NULL)
    computed = []
    plain = type(model).conditioning
    monkeypatch.setattr(XAR, "conditioning", lambda model, t, y: (computed.append(t.numel()), plain(model, t, y))[1])
    needed = modulation_bytes(model, classes=3, times=5)  # 3, 7 and the null class; 1, 3/4, 1/2, 1/4 and 0
    ahead = sequence(model, noise, solve, table_bytes=needed)
    assert computed == [15]
    each = sequence(model, noise, solve, table_bytes=needed - 1)
    assert len(computed) > 4
    assert_equal(ahead, each)


def test_times_that_nobody_announced():
    model = tiny()
    noise = noise_of(model)[:, :16]
    announced = PartSampler(model, CLASSES, NULL, [0.7])
    surprised = PartSampler(model, CLASSES, NULL, [0.3])
    for first in (announced, surprised):
        assert (first.modulations.table is not None) and len(first.modulations.table) == 3
    (ours,), (expected,) = (x.velocities(0, [noise], [0.7], ("cond", "uncond")) for x in (surprised, announced))
    assert_equal(ours, expected)


def test_a_time_is_embedded_as_the_float32_product():
    model = tiny()
    noise = noise_of(model)[:, :16]
    engine = PartSampler(model, CLASSES, times=[0.28, 0.2801])
    velocities = [engine.velocities(0, [noise], [t], ("cond",))[0] for t in (0.28, 0.2801, 0.27999)]
    same, other = ((velocities[0] - velocity).abs().max() for velocity in velocities[1:])
    assert same < 1e-12  # 280; in double the first would be 279. Rows of one product may be rounded in two ways
    assert other > 1e-6


# ---- what a run computes ----


class Counted(PartSampler):
    """Keeps its evaluations."""

    def _run(self, evaluation, parts):
        self.evaluations = [*getattr(self, "evaluations", []), evaluation]
        return super()._run(evaluation, parts)


def evaluations(solve: Solver, **changes) -> list:
    model = tiny(**changes)
    scales = guidance_scales(model.entities.count)
    engine = Counted(model, CLASSES, NULL, solve.times(scales))
    solve.parts(engine, noise_of(model).split(model.entities.sizes, dim=1), scales)
    return engine.evaluations


def test_the_first_part_has_no_null_rows_and_a_finished_part_goes_along_with_the_next():
    found = evaluations(Solver(num_steps=2, cfg_scale=2.0, null=NULL))
    both = ("cond", "uncond")
    assert [e.branches for e in found] == [("cond",)] * 2 + [both] * 6
    assert [(e.first, e.times) for e in found] == [
        (0, (1.0,)), (0, (0.5,)), (0, (0.0, 1.0)), (1, (0.5,)),
        (1, (0.0, 1.0)), (2, (0.5,)), (2, (0.0, 1.0)), (3, (0.5,)),
    ]  # fmt: skip


def test_null_rows_of_finished_parts_wait_until_guidance_asks():
    solve = Solver(num_steps=2, cfg_scale=2.0, null=NULL, guidance_low=0.0, guidance_high=0.6)
    found = evaluations(solve)
    assert [e.branches for e in found[:2]] == [("cond",)] * 2
    assert (found[2].branches, found[2].times) == (("cond",), (0.0, 1.0))  # part 1's first step is not guided
    assert (found[3].branches, found[3].first, found[3].times) == (("uncond",), 0, (0.0,))
    assert (found[4].branches, found[4].times) == (("cond", "uncond"), (0.5,))


def test_without_guidance_nothing_has_null_rows():
    model = tiny()
    engine = Counted(model, CLASSES)
    Solver(num_steps=2).parts(engine, noise_of(model).split(16, dim=1), guidance_scales(4))
    assert {e.branches for e in engine.evaluations} == {("cond",)}
    assert engine.cache_bytes == cache_bytes(model, batch=3, guided=False) == 2 * 3 * 3 * 64 * 32 * 8


def test_the_buffers_stay_where_they_are():
    model = tiny()
    engine = PartSampler(model, CLASSES, NULL)
    noise = noise_of(model).split(16, dim=1)
    places = set()
    for k in range(4):
        engine.velocities(k, [noise[k]], [1.0], ("cond", "uncond"))
        engine.finish(k, noise[k])
        places.add((engine._keys.data_ptr(), engine._values.data_ptr()))
    assert len(places) == 1
    assert engine.cache_bytes == cache_bytes(model, batch=3, guided=True)


# ---- FLOPs ----


def counted_by_torch(model: XAR, solve: Solver, **engine) -> int:
    with FlopCounterMode(display=False) as counter:
        sequence(model, noise_of(model, 1), solve, **engine)
    return counter.get_total_flops()


@pytest.mark.parametrize("stagger", [None, 0, 1])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(("entity", "size"), [("cell", 4), ("scale", 2)])
def test_flops_are_those_that_torch_counts(entity, size, table, stagger):
    model = tiny(entity=entity, entity_size=size, fused_attn=False)
    solve = Solver(num_steps=3, stagger=stagger, cfg_scale=2.0, null=NULL)
    budget = {} if table else {"table_bytes": 0}
    # The null class at the times of unguided parts is in the table, and among those of an evaluation.
    expected = counted_by_torch(model, solve, **budget)
    assert count_flops(model, solve, table=table).flops == pytest.approx(expected, rel=0.02)


def test_flops_of_a_run_with_fewer_steps_for_later_parts():
    model = tiny()
    solve = Solver(part_steps=[4, 3, 2, 1], cfg_scale=2.0, null=NULL)
    counter = count_flops(model, solve)
    assert counter.evaluations == 10
    assert counter.tokens == 16 * 4 + 2 * 16 * (3 + 2 + 1 + 3)  # part 0 alone, then both halves and finished parts
    assert counter.flops < count_flops(model, Solver(num_steps=4, cfg_scale=2.0, null=NULL)).flops


def test_counting_leaves_the_random_numbers_alone():
    model, generator = tiny(), torch.Generator().manual_seed(3)
    solve = Solver(sampler="euler-maruyama", num_steps=3, generator=generator, step_noise=iter(()))
    before = generator.get_state()
    assert count_flops(model, solve).evaluations == 12
    assert torch.equal(generator.get_state(), before)


# ---- what bad input gets ----


def test_the_sampler_of_whole_images_samples_it_in_parts():
    """With a cache and without."""
    model = tiny()
    noise = noise_of(model)
    settings = {"num_steps": 8, "cfg_scale": 2.0, "null": NULL}
    expected = sample_parts(model, noise, CLASSES, Solver(**settings))
    assert torch.equal(sample(model, noise, CLASSES, **settings), expected)
    fast = haste.enable_cache(model, cache="newton", interval=2, order=1)
    forecast = sample(fast, noise, CLASSES, **settings)
    assert fast.report.forecast_calls > 0 and 0 < (forecast - expected).norm() < expected.norm()


def test_noise_of_scales_is_a_sequence():
    model = tiny(entity="scale", entity_size=2)
    with pytest.raises(ValueError, match="^noise must"):
        sample(model, torch.randn(3, 3, 8, 8).double(), CLASSES, num_steps=2)


@pytest.fixture
def captures(monkeypatch) -> list:
    """In place of a capture: a replay computes anew from the captured inputs, into the memory of the first output."""
    captured = []

    def stand_in(function, inputs):
        output = function(*inputs)
        captured.append(tuple(inputs[0].shape))

        def replay():
            output.copy_(function(*inputs))

        return replay, output

    monkeypatch.setattr("haste.cuda_graphs.capture", stand_in)
    return captured


@pytest.mark.parametrize(("entity", "size"), [("cell", 4), ("scale", 2)])
def test_replayed_graphs_give_the_same_images_batch_after_batch(entity, size, captures):
    model = tiny(entity=entity, entity_size=size)
    settings = {"num_steps": 4, "cfg_scale": 2.0, "null": NULL}
    batches = [(noise_of(model, seed=seed), CLASSES + seed) for seed in range(3)]
    expected = [sample_parts(model, noise, labels, Solver(**settings)) for noise, labels in batches]
    model.replays = Replays()
    for (noise, labels), images in zip(batches, expected, strict=True):
        assert torch.equal(sample_parts(model, noise, labels, Solver(**settings)), images)
        assert len(captures) == 2 * model.entities.count - 1  # the first evaluation of a part but the first, and others


def test_a_stagger_of_a_model_that_saw_clean_cells_is_warned_of(caplog):
    model = tiny(context="clean", entity_size=4)
    sample_parts(model, noise_of(model), CLASSES, Solver(num_steps=2))
    assert not caplog.records
    sample_parts(model, noise_of(model), CLASSES, Solver(num_steps=2, stagger=1))
    assert "clean" in caplog.text


def test_graphs_of_a_model_on_no_gpu_are_refused():
    with pytest.raises(UserError, match="GPU"):
        tiny().capture()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu():
    model = tiny(torch.float32).cuda()
    noise, settings = noise_of(model).cuda(), {"num_steps": 8, "cfg_scale": 2.0, "null": NULL}
    expected = sample(model, noise, CLASSES.cuda(), **settings)
    model.capture()
    for _ in range(2):
        torch.testing.assert_close(sample(model, noise, CLASSES.cuda(), **settings), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 4, 4), (3, 16, 16), (48, 3), (64, 4), (80, 3), (64,)])
def test_noise_of_another_shape_is_refused(shape):
    model = tiny()
    with pytest.raises(ValueError, match="^noise must"):
        sample(model, torch.randn(3, *shape).double(), CLASSES, num_steps=2)


@pytest.mark.parametrize("classes", [[3, 7, 11], [3, -1, 3], [3.0, 7.0, 3.0]])
def test_classes_that_the_model_has_not_are_refused(classes):
    model = tiny()
    with pytest.raises(ValueError, match="^condition must"):
        sample(model, noise_of(model), torch.tensor(classes), num_steps=2)


def test_a_null_class_that_the_model_has_not_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="^null must"):
        sample(model, noise_of(model), CLASSES, num_steps=2, cfg_scale=2.0, null=11)


def test_no_images_are_no_images():
    assert sample(tiny(), torch.empty(0, 3, 8, 8).double(), CLASSES[:0], num_steps=2).shape == (0, 3, 8, 8)


def test_bad_input():
    model = tiny()
    noise = noise_of(model).split(16, dim=1)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        PartSampler(tiny().train(), CLASSES)
    engine = PartSampler(model, CLASSES)
    with pytest.raises(ValueError, match="null must be"):
        engine.velocities(0, [noise[0]], [1.0], ("cond", "uncond"))
    with pytest.raises(ValueError, match="first must be"):
        engine.velocities(1, [noise[0]], [1.0], ("cond",))
    with pytest.raises(ValueError, match="states must be"):
        engine.velocities(0, [noise[0]] * 5, [1.0] * 5, ("cond",))
    with pytest.raises(ValueError, match="times must be"):
        engine.velocities(0, [noise[0]], [], ("cond",))
    with pytest.raises(ValueError, match="branches must be"):
        engine.velocities(0, [noise[0]], [1.0], ("uncond", "cond"))
    with pytest.raises(ValueError, match="state of part 0 must be"):
        engine.velocities(0, [noise[0][:, :3]], [1.0], ("cond",))
    with pytest.raises(ValueError, match="part must be"):
        engine.finish(1, noise[1])
