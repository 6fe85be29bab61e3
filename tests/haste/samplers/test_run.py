"""The samplers on Gaussian data, whose velocity field, flow and marginals are known in closed form."""

from __future__ import annotations

import pytest
import torch
from haste.errors import UserError
from haste.models import ModelOutput
from haste.samplers import (
    BOTH,
    COND,
    SAMPLERS,
    Guidance,
    ModelCall,
    initial_noise,
    model_calls,
    sample,
    time_grid,
    time_of,
    times_at,
)
from haste.transport import get_path

MEAN, STD = 0.7, 0.4


def gaussian_velocity(path: str):
    """E[v | x_t] where the data are N(MEAN, STD²) in every pixel."""

    def velocity(x, t, y):
        alpha, sigma, d_alpha, d_sigma = (c[:, None, None, None] for c in get_path(path).coefficients(t))
        centred = (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return d_alpha * (MEAN + alpha * STD**2 * centred) + d_sigma * sigma * centred

    return velocity


class Recorder:
    """A model that keeps what it was called with; its velocity is the label (0 for the null class, -1)."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.started: list[list[ModelCall]] = []

    def start(self, plan: list[ModelCall]) -> None:
        self.started.append(plan)

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        velocity = y.clamp(min=0).to(x.dtype)[:, None, None, None].expand_as(x)
        return ModelOutput(velocity, [], [])


def noise_like(batch: int, dtype=torch.float64) -> torch.Tensor:
    return initial_noise((batch, 1, 4, 4), torch.Generator().manual_seed(0), dtype=dtype)


def labels_for(batch: int) -> torch.Tensor:
    return torch.arange(batch) + 1


# -- the equations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2)])
def test_ode_reaches_the_exact_flow_at_its_order(sampler, order, path):
    """The flow keeps (x_t − αm)/√(α²s² + σ²), so noise ε ends at m + s·ε. Twice the steps, 2^order less error."""
    noise = noise_like(16)
    exact = MEAN + STD * noise
    errors = [
        (sample(gaussian_velocity(path), noise, labels_for(16), num_steps=n, sampler=sampler, path=path) - exact)
        .abs().max().item()
        for n in (40, 80)
    ]  # fmt: skip
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_reaches_the_mean_and_variance_of_the_data(path):
    """And forgets the noise that it began with as fast as a diffusion of 2t must: the normalised state is an
    Ornstein-Uhlenbeck process of rate t / Var x_t, down to the last noisy time, 0.04."""
    generator = torch.Generator().manual_seed(0)
    noise = initial_noise((4000, 1, 4, 4), generator, dtype=torch.float64)
    images = sample(
        gaussian_velocity(path), noise, labels_for(4000), num_steps=100, sampler="euler-maruyama", path=path,
        generator=generator,
    )  # fmt: skip
    assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert images.std().item() == pytest.approx(STD, abs=0.012)
    t = torch.linspace(0.04, 1, 10_001, dtype=torch.float64)
    alpha, sigma, _, _ = get_path(path).coefficients(t)
    memory = torch.trapezoid(-t / ((alpha * STD) ** 2 + sigma**2), t).exp().item()
    correlation = torch.corrcoef(torch.stack([noise.flatten(), images.flatten()]))[0, 1].item()
    assert correlation == pytest.approx(memory, abs=0.02)


def test_one_sde_step_by_hand():
    """v = 1 everywhere, t from 1 to 0.04 and, without noise, to 0; the linear path's score is −((1−t)v + x)/t."""

    def ones(x, t, y):
        return torch.ones_like(x)

    x = noise = noise_like(2)
    stir = initial_noise(noise.shape, torch.Generator().manual_seed(5), dtype=torch.float64)
    for t, t_next, kick in ((1.0, 0.04, stir), (0.04, 0.0, torch.zeros_like(stir))):
        score = -((1 - t) * 1 + x) / t
        drift = 1 - 0.5 * (2 * t) * score
        x = x + drift * (t_next - t) + (2 * t) ** 0.5 * (t - t_next) ** 0.5 * kick
    generator = torch.Generator().manual_seed(5)
    got = sample(ones, noise, labels_for(2), num_steps=2, sampler="euler-maruyama", generator=generator)
    torch.testing.assert_close(got, x)


def test_state_is_double_and_the_model_gets_its_own_type():
    """A thousand float32 updates of 0.001 would leave an error of 1e-5; the model sees float32 all the same."""
    model = Recorder()
    model.dtype = torch.float32
    noise = noise_like(1)
    images = sample(model, noise, labels_for(1), num_steps=1000)
    assert (images - (noise - 1)).abs().max() < 1e-12 and images.dtype == torch.float64
    assert {(x.dtype, t.dtype) for x, t, _ in model.calls} == {(torch.float32, torch.float32)}


def test_without_a_type_the_model_gets_that_of_the_noise():
    model = Recorder()
    images = sample(model, noise_like(2, torch.float32), labels_for(2), num_steps=3)
    assert model.calls[0][0].dtype == images.dtype == torch.float32


# -- times, evaluations, guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, times",
    [
        ("euler", [1, 0.75, 0.5, 0.25]),
        ("heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        ("euler-maruyama", [1, 0.68, 0.36, 0.04]),
    ],
)
def test_times_and_the_plan_a_model_is_told(sampler, times):
    model = Recorder()
    sample(model, noise_like(2), labels_for(2), num_steps=4, sampler=sampler)
    assert [t.tolist() for _, t, _ in model.calls] == [pytest.approx([time] * 2) for time in times]
    assert model.started == [model_calls(sampler, 4)]
    grid = [1, 0.68, 0.36, 0.04] if sampler == "euler-maruyama" else [1, 0.75, 0.5, 0.25]
    assert [grid[evaluation.position] for evaluation in model.started[0]] == pytest.approx(times)
    expected_steps = [0, 0, 1, 1, 2, 2, 3] if sampler == "heun" else [0, 1, 2, 3]
    assert [evaluation.step for evaluation in model.started[0]] == expected_steps


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_a_shift_moves_the_times_towards_noise(sampler, path):
    model = Recorder()
    sample(model, noise_like(1), labels_for(1), num_steps=4, sampler=sampler, path=path, time_shift=3.0)
    assert model.started == [model_calls(sampler, 4, time_shift=3.0, path=path)]
    assert [t.item() for _, t, _ in model.calls] == [call.time for call in model.started[0]]
    grid = time_grid(sampler, 4, time_shift=3.0, path=path)
    alpha, sigma, _, _ = get_path(path).coefficients(grid[1:4])
    back = get_path(path).time_of_noise_level(sigma / alpha / 3)  # even again
    step = 0.25 if sampler != "euler-maruyama" else (1 - back[-1].item()) / 3
    torch.testing.assert_close(back, 1 - step * torch.arange(1, 4, dtype=torch.float64))
    assert grid[0] == 1 and grid[-1] == 0 and (sampler != "euler-maruyama" or grid[3].item() == pytest.approx(0.04))
    assert torch.equal(time_grid(sampler, 4), time_grid(sampler, 4, time_shift=1.0, path=path))


def test_the_guidance_interval_goes_by_the_shifted_time():
    guidance = Guidance(2.0, 0.0, 0.6)
    calls = model_calls("euler", 4, guidance, time_shift=3.0)  # at 1, 0.9, 0.75 and 0.5
    assert [call.branches for call in calls] == [COND, COND, COND, BOTH]


def test_a_shift_of_a_model_of_noise_or_out_of_bounds_is_refused():
    with pytest.raises(UserError, match="^time_shift must be a number from 0.001 to 1,000, got 0$"):
        sample(Recorder(), noise_like(1), labels_for(1), time_shift=0)
    model = Recorder()
    model.prediction = "noise"
    with pytest.raises(UserError, match="^time_shift must be left out for a model that predicts noise, got 3"):
        sample(model, noise_like(1), labels_for(1), time_shift=3.0)


def test_guidance_doubles_the_batch_inside_its_interval_only():
    model = Recorder()
    noise, labels = noise_like(2), labels_for(2)
    images = sample(model, noise, labels, num_steps=4, cfg_scale=3.0, guidance_low=0.5, guidance_high=0.75, null=-1)
    assert [len(x) for x, _, _ in model.calls] == [2, 4, 4, 2]
    x, _, y = model.calls[1]
    assert y.tolist() == [1, 2, -1, -1] and torch.equal(x[:2], x[2:])
    # v = label; guided 0 + 3·(label − 0): two plain quarters and two guided ones.
    expected = noise - labels[:, None, None, None] * (0.5 + 3 * 0.5)
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("mode", ["batched", "separate"])
@pytest.mark.parametrize("sampler", SAMPLERS["v"])
def test_of_the_first_channels_alone_the_others_are_those_of_the_label(sampler, mode):
    """As SiT's and DiT's sampler, here written out: guided and unguided channels side by side in the model's output."""
    noise, labels = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])

    def velocity(x, t, y):
        return (x * (1 + y.view(-1, 1, 1, 1)) * t.view(-1, 1, 1, 1)).tanh()

    def of_sit(x, t, y):
        with_label, without = velocity(x, t, y), velocity(x, t, torch.full_like(y, 3))
        guided = without[:, :3] + 2.5 * (with_label - without)[:, :3]
        return torch.cat([guided, with_label[:, 3:]], dim=1)

    common = {"num_steps": 4, "sampler": sampler}
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    wanted = sample(of_sit, noise.double(), labels, generator=generators[0], **common)
    drawn = sample(velocity, noise.double(), labels, generator=generators[1], **common, cfg_scale=2.5, null=3,
                   guidance=mode, guided_channels=3)  # fmt: skip
    torch.testing.assert_close(drawn, wanted, rtol=1e-12, atol=1e-12)


def test_both_evaluations_of_a_heun_step_are_guided_alike():
    model = Recorder()
    sample(model, noise_like(1), labels_for(1), num_steps=4, sampler="heun", cfg_scale=2.0, guidance_low=0.6, null=-1)
    assert [len(x) for x, _, _ in model.calls] == [2, 2, 2, 2, 1, 1, 1]


def test_guiding_the_velocity_guides_the_drift():
    """One SDE step with guidance: w·drift(label) + (1 − w)·drift(null), each drift made from its own velocity."""
    noise, labels = noise_like(2), labels_for(2)
    drifts = []
    for y in (labels, torch.zeros_like(labels)):
        drifts.append(noise - sample(Recorder(), noise, y, num_steps=1, sampler="euler-maruyama"))
    guided = sample(Recorder(), noise, labels, num_steps=1, sampler="euler-maruyama", cfg_scale=2.5, null=-1)
    torch.testing.assert_close(noise - guided, 2.5 * drifts[0] - 1.5 * drifts[1])


def test_without_guidance_the_batch_is_never_doubled():
    model = Recorder()
    sample(model, noise_like(2), labels_for(2), num_steps=3)
    assert [len(x) for x, _, _ in model.calls] == [2, 2, 2]


# -- noise, progress, bad input ---------------------------------------------------------------------------------


def test_with_a_generator_per_image_an_image_does_not_depend_on_its_batch():
    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = initial_noise((len(seeds), 1, 4, 4), generators)
        labels = torch.ones(len(seeds), dtype=torch.long)
        return sample(
            gaussian_velocity("linear"), noise, labels, num_steps=5, sampler="euler-maruyama", generator=generators
        )

    together, apart = draw([3, 4, 5]), torch.cat([draw([3]), draw([4]), draw([5])])
    assert torch.equal(together, apart)
    assert not torch.equal(together[0], together[1])


def test_progress_is_told_every_step():
    told = []
    sample(Recorder(), noise_like(1), labels_for(1), num_steps=3, sampler="heun", progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("sampler", SAMPLERS["v"])
def test_an_empty_batch_gives_an_empty_batch(sampler):
    assert sample(Recorder(), torch.empty(0, 1, 4, 4), labels_for(0), num_steps=2, sampler=sampler).shape[0] == 0


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"sampler": "ddim"}, "sampler must be one of euler, heun, euler-maruyama"),
        ({"num_steps": 0}, "num_steps must be an integer from 1 to 10,000, got 0"),
        ({"path": "vp"}, "path must be one of"),
        ({"cfg_scale": 0.5}, "cfg_scale must be a number from 1 to 1,000, got 0.5"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be a number from 1 to 1,000, got inf"),
        ({"cfg_scale": 2.0}, "null must be the null condition"),
        ({"guidance_high": float("nan")}, "guidance_high must be a number from 0 to 1, got nan"),
        ({"guidance_low": 0.8, "guidance_high": 0.3}, "guidance_low must be at most guidance_high"),
    ],
)
def test_settings_that_make_no_sense(settings, sentence):
    model = Recorder()
    with pytest.raises(UserError, match=sentence):
        sample(model, noise_like(1), labels_for(1), **settings)
    assert not model.calls and not model.started


@pytest.mark.parametrize("sampler", SAMPLERS["v"])
def test_a_step_that_gives_nan_is_named(sampler):
    def breaks(x, t, y):
        return torch.full_like(x, float("nan") if t[0] < 0.45 else 0.0)

    with pytest.raises(UserError, match=r"step [67] of 10, at t = 0\.\d+, gave NaN or infinity"):
        sample(breaks, noise_like(2), labels_for(2), num_steps=10, sampler=sampler)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="condition must have as many rows as noise, 2"):
        sample(Recorder(), noise_like(2), labels_for(3))
    with pytest.raises(ValueError, match="model must be in eval mode"):
        sample(torch.nn.Identity(), noise_like(1), labels_for(1))
    with pytest.raises(ValueError, match="generator must have one entry per image, 2"):
        initial_noise((2, 1, 4, 4), [torch.Generator()])


# -- times that know their value -----------------------------------------------------------------------------------


def test_times_know_their_value_until_they_are_written_to():
    times = times_at(0.3, 4, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(times, torch.full((4,), 0.3, dtype=torch.bfloat16)) and time_of(times) == 0.3
    for other in (times * 1000, times.clone(), times[:2], torch.full((4,), 0.3)):
        assert time_of(other) is None
    times[1:].mul_(2)
    assert time_of(times) is None


def test_in_inference_mode_too():
    with torch.inference_mode():
        assert time_of(times_at(0.25, 2, torch.float32, torch.device("cpu"))) == 0.25


def test_calls_of_an_unknown_sampler_are_refused():
    with pytest.raises(UserError, match="^sampler must be one of euler, heun, euler-maruyama, ddim, ddpm, got 'huen'$"):
        model_calls("huen", 5)
    with pytest.raises(UserError, match="^num_steps must be an integer from 1 to 10,000, got '5'$"):
        model_calls("heun", "5")
