"""DDIM and DDPM, against loops written here in plain float64 and against diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from haste.diffusion import spaced_times
from haste.errors import UserError
from haste.models import DiT
from haste.samplers import Guidance, initial_noise, model_calls, sample

ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SIZES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 4, "num_classes": 10}


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    model = DiT(**SIZES).double().eval()
    for parameter in model.parameters():  # without the zeros that a new model begins with
        torch.nn.init.normal_(parameter, std=0.05) if parameter.requires_grad else None
    return model


@pytest.fixture
def start():
    torch.manual_seed(1)
    return torch.randn(3, 4, 4, 4, dtype=torch.float64), torch.tensor([1, 7, 3])


def predict(model, x, t, y):
    return model(x, torch.full((len(x),), t), y).prediction.chunk(2, dim=1)


def defined_ddim(model, x, y, times):
    """DDIM's eq. 12 with σ = 0."""
    for step, t in enumerate(times):
        noise, _ = predict(model, x, t, y)
        after = ALPHA_BARS[times[step + 1]] if step + 1 < len(times) else 1.0
        clean = (x - math.sqrt(1 - ALPHA_BARS[t]) * noise) / math.sqrt(ALPHA_BARS[t])
        x = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
    return x


def defined_ddpm(model, x, y, times, step_noise):
    """Ancestral steps of the process that has the times alone: the posterior's mean of the guessed image."""
    for step, t in enumerate(times):
        noise, u = predict(model, x, t, y)
        before = ALPHA_BARS[times[step + 1]] if step + 1 < len(times) else 1.0
        alpha_bar, beta = ALPHA_BARS[t], 1 - ALPHA_BARS[t] / before
        guess = (x - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)
        x = (math.sqrt(before) * beta * guess + math.sqrt(1 - beta) * (1 - before) * x) / (1 - alpha_bar)
        if step + 1 < len(times):
            low, high = math.log(beta * (1 - before) / (1 - alpha_bar)), math.log(beta)
            x = x + torch.exp(((u + 1) / 2 * high + (1 - u) / 2 * low) / 2) * step_noise[step]
    return x


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_ddim_is_that_of_the_definition(dit, start, spacing):
    times = spaced_times(8, spacing).tolist()
    with torch.no_grad():
        expected = defined_ddim(dit, *start, times)
    found = sample(dit, *start, num_steps=8, sampler="ddim", timestep_spacing=spacing)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_ddpm_is_that_of_the_definition(dit, start, spacing):
    step_noise = [torch.randn_like(start[0]) for _ in range(7)]
    with torch.no_grad():
        expected = defined_ddpm(dit, *start, spaced_times(8, spacing).tolist(), step_noise)
    found = sample(dit, *start, num_steps=8, sampler="ddpm", timestep_spacing=spacing, step_noise=step_noise)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_that_of_diffusers(dit, start, spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    found = sample(dit, *start, num_steps=20, timestep_spacing=spacing)
    assert (found - diffusers_loop(scheduler, dit, *start, 20)).norm() <= 1e-6 * found.norm()


def test_ddim_of_diffusers_steps_to_other_times_than_it_calls_at_with_linspace(dit, start):
    """Which is why haste has its own: diffusers steps by 1000 // n from each time, whatever the next one is."""
    scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
    found = sample(dit, *start, num_steps=20, timestep_spacing="linspace")
    assert (found - diffusers_loop(scheduler, dit, *start, 20)).norm() > 1e-3 * found.norm()


@pytest.mark.parametrize("spacing", ["linspace", "leading"])  # with trailing, diffusers adds noise to the image itself
def test_ddpm_is_that_of_diffusers(dit, start, spacing):
    scheduler = DDPMScheduler(timestep_spacing=spacing, clip_sample=False, variance_type="learned_range")
    generator = torch.Generator().manual_seed(5)
    step_noise = [torch.randn(start[0].shape, generator=generator, dtype=torch.float64) for _ in range(19)]
    found = sample(dit, *start, num_steps=20, sampler="ddpm", timestep_spacing=spacing, step_noise=step_noise)
    expected = diffusers_loop(scheduler, dit, *start, 20, generator=torch.Generator().manual_seed(5))
    assert (found - expected).norm() <= 1e-6 * found.norm()


@torch.no_grad()
def diffusers_loop(scheduler, model, x, y, num_steps, **settings):
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        output = model(x, t.expand(len(x)), y).prediction
        own = output if settings else output[:, : x.shape[1]]
        x = scheduler.step(own, t, x, **settings).prev_sample
    return x


@pytest.mark.parametrize("mode", ["batched", "separate"])
@pytest.mark.parametrize("channels", [3, None])
def test_guidance_reaches_the_noise_alone(dit, start, mode, channels):
    """DiT guides three of four channels, and has the variance of the condition."""
    step_noise = [torch.randn_like(start[0]) for _ in range(3)]

    class Guided:
        def __call__(self, x, t, y):
            cond, uncond = (dit(x, t, labels).prediction for labels in (y, torch.full_like(y, 10)))
            count = channels or 4
            guided = uncond[:, :count] + 1.5 * (cond[:, :count] - uncond[:, :count])
            return type("Output", (), {"prediction": torch.cat([guided, cond[:, count:]], dim=1)})

    with torch.no_grad():
        expected = defined_ddpm(Guided(), *start, spaced_times(4).tolist(), step_noise)
    found = sample(dit, *start, num_steps=4, sampler="ddpm", cfg_scale=1.5, null=10, guidance=mode,
                   guided_channels=channels, step_noise=step_noise)  # fmt: skip
    assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_a_guidance_interval_is_of_shares_of_the_noise():
    calls = model_calls("ddim", 5, Guidance(2.0, 0.2, 0.7), "trailing")
    assert [call.time for call in calls] == [999, 799, 599, 399, 199]
    assert [len(call.branches) for call in calls] == [1, 1, 2, 2, 2]  # begin at 1, 0.8, 0.6, 0.4 and 0.2


def test_times_are_exact_for_a_model_in_bfloat16(dit, start):
    seen = []

    class Spy(torch.nn.Module):
        prediction, dtype = "noise", torch.bfloat16

        def forward(self, x, t, y):
            seen.append(t[0].item())
            return torch.zeros(len(x), 8, 4, 4, dtype=x.dtype)

    sample(Spy().eval(), start[0].to(torch.bfloat16), start[1], num_steps=250)
    assert seen == spaced_times(250).tolist()


def test_an_image_does_not_depend_on_its_batch(dit, start):
    def generators():
        return [torch.Generator().manual_seed(number) for number in range(3)]

    noise = initial_noise(start[0].shape, generators(), dtype=torch.float64)
    both = sample(dit, noise, start[1], num_steps=4, sampler="ddpm", generator=generators())
    alone = sample(dit, noise[2:], start[1][2:], num_steps=4, sampler="ddpm", generator=generators()[2:])
    torch.testing.assert_close(both[2:], alone, rtol=1e-10, atol=1e-10)


def test_the_default_is_ddim(dit, start):
    assert torch.equal(sample(dit, *start, num_steps=4), sample(dit, *start, num_steps=4, sampler="ddim"))


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_samplers_of_a_velocity_are_refused(dit, start, sampler):
    with pytest.raises(
        UserError, match=f"^sampler must be one of ddim, ddpm for a model that .* noise, got '{sampler}'"
    ):
        sample(dit, *start, sampler=sampler)


def test_samplers_of_noise_are_refused_for_a_velocity(start):
    with pytest.raises(UserError, match="^sampler must be one of euler, .* predicts a velocity, got 'ddpm'"):
        sample(lambda x, t, y: x, *start, sampler="ddpm")


def test_settings_of_other_models_are_refused(dit, start):
    with pytest.raises(UserError, match="^path must be left out for a model that predicts noise, got cosine$"):
        sample(dit, *start, path="cosine")
    with pytest.raises(UserError, match="^timestep_spacing must be left out for .* a velocity, got leading$"):
        sample(lambda x, t, y: x, *start, timestep_spacing="leading")


@pytest.mark.parametrize("t", [0.5, -1.0, 1000, 999.5, math.nan])
def test_times_of_other_models_are_refused(dit, start, t):
    with pytest.raises(ValueError, match=f"^t must be whole numbers from 0 to 999, the times of DiT, got {t:g}$"):
        dit(start[0], torch.tensor([3.0, t, 7.0]), start[1])


@pytest.mark.parametrize(
    ("t", "got"),
    [(torch.tensor([True, False, True]), "bool"), (torch.ones(3, dtype=torch.complex64), "complex64")],
)
def test_times_that_are_no_numbers_are_refused(dit, start, t, got):
    with pytest.raises(ValueError, match=f"^t must be int64 or float32, got {got}$"):
        dit(start[0], t, start[1])


def test_no_images(dit, start):
    assert sample(dit, start[0][:0], start[1][:0], num_steps=2, sampler="ddpm").shape == (0, 4, 4, 4)


@pytest.mark.parametrize("channels", [0, 1.5, "3", True])
def test_guided_channels_that_are_no_number_of_channels(dit, start, channels):
    with pytest.raises(UserError, match="^guided_channels must be an integer from 1"):
        sample(dit, *start, cfg_scale=2, null=10, num_steps=2, guided_channels=channels)


def test_ddpm_needs_a_variance(start):
    class NoiseAlone(torch.nn.Module):
        prediction = "noise"

        def forward(self, x, t, y):
            return x

    model = NoiseAlone().eval()
    assert sample(model, *start, num_steps=2).shape == start[0].shape
    with pytest.raises(ValueError, match="^the prediction must have 8 channels for ddpm, noise and variance, got 4"):
        sample(model, *start, num_steps=2, sampler="ddpm")
