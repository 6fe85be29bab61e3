"""TaylorSeer around a SiT, against the published recurrence written out plainly, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from haste.caching import TaylorSeer
from haste.errors import UserError
from haste.models import SiT
from haste.sampling import initial_noise, sample


def small_sit(depth: int = 2) -> SiT:
    torch.manual_seed(0)
    model = SiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=depth, num_heads=4, num_classes=10
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_noise(batch: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return initial_noise((batch, 1, 8, 8), torch.Generator().manual_seed(1), dtype=dtype), torch.arange(batch)


def published(model: SiT, x, labels, num_steps: int, full: list[int], order: int) -> torch.Tensor:
    """Euler with TaylorSeer as its authors put it: terms kept per module, the step counted down, dictionaries."""
    cache: dict[tuple[int, str], list[torch.Tensor]] = {}
    activated: list[int] = []
    for index in range(num_steps):
        step = num_steps - 1 - index
        if index in full:
            activated.append(step)
        t = torch.full((len(x),), 1 - index / num_steps, dtype=x.dtype)

        def branch(key, compute, is_full=index in full, step=step):
            if not is_full:
                x = step - activated[-1]
                return sum(term * x**i / math.factorial(i) for i, term in enumerate(cache[key]))
            new, old = [compute()], cache.get(key, [])
            for i in range(order):
                if i < len(old):
                    new.append((new[i] - old[i]) / (activated[-1] - activated[-2]))
            cache[key] = new
            return new[0]

        tokens, c = model.embed(x, t, labels)
        for number, block in enumerate(model.blocks):
            shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in block.adaLN_modulation(c).chunk(6, dim=1))
            h = tokens
            tokens = h + gate * branch(
                (number, "attn"), lambda b=block, h=h, s=scale, o=shift: b.attn(b.norm1(h) * (1 + s) + o)[0]
            )
            h = tokens
            tokens = h + gate2 * branch(
                (number, "mlp"), lambda b=block, h=h, s=scale2, o=shift2: b.mlp(b.norm2(h) * (1 + s) + o)
            )
        x = x - model.finish(tokens, c) / num_steps
    return x


@pytest.mark.parametrize("interval, order", [(2, 0), (3, 1), (4, 2), (3, 3), (4, 4)])
@torch.no_grad()
def test_it_is_the_published_recurrence(interval, order):
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    full = [0, *range(1, 20, interval)]
    expected = published(model, noise, labels, 20, full, order)
    seer = TaylorSeer(model, interval, order)
    got = sample(seer, noise, labels, num_steps=20)
    # The weights reach the kernel in float32.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert (seer.num_full, seer.num_skipped) == (len(full), 20 - len(full))
    uncached = sample(model, noise, labels, num_steps=20)
    assert (expected - uncached).abs().max() > 1e-4  # the comparison above is not one of two full runs


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
def test_interval_one_is_the_model_bit_for_bit(sampler):
    model = small_sit()
    noise, labels = small_noise()
    images = [
        sample(m, noise, labels, num_steps=6, sampler=sampler, cfg_scale=2.0, guidance_low=0.5, null_label=10,
               generator=torch.Generator().manual_seed(2))
        for m in (model, TaylorSeer(model, interval=1, order=2))
    ]  # fmt: skip
    assert torch.equal(images[0], images[1])


@torch.no_grad()
def test_a_skipped_step_runs_no_attention_and_no_mlp():
    model = small_sit()
    ran = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: ran.append("attn"))
        block.mlp.register_forward_hook(lambda *_: ran.append("mlp"))
        block.adaLN_modulation.register_forward_hook(lambda *_: ran.append("modulation"))
    noise, labels = small_noise()
    seer = TaylorSeer(model, interval=2, order=1, first_enhance=1, num_steps=3)
    for step, expected in enumerate((["modulation", "attn", "mlp"] * 2, ["modulation"] * 2)):
        ran.clear()
        seer(noise, torch.full((2,), 1 - step / 3), labels)
        assert ran == expected


@torch.no_grad()
def test_a_forecast_of_constant_features_follows_the_gate_of_its_own_time():
    """With order 0 a skipped step adds gate(t) times the old branches; t, and so the gates, are the new ones."""
    model = small_sit(depth=1)
    noise, labels = small_noise()
    seer = TaylorSeer(model, interval=3, order=0, first_enhance=1, num_steps=3)
    seer(noise, torch.ones(2), labels)
    tokens, c = model.embed(noise, torch.ones(2), labels)
    block = model.blocks[0]
    m = block.modulation(c)
    attn = block.attention_branch(tokens, m.shift_attn, m.scale_attn)[0]
    mlp = block.mlp_branch(tokens + m.gate_attn[:, None] * attn, m.shift_mlp, m.scale_mlp)

    x, t = noise * 0.9, torch.full((2,), 0.5)
    tokens, c = model.embed(x, t, labels)
    m = block.modulation(c)
    expected = model.finish(tokens + m.gate_attn[:, None] * attn + m.gate_mlp[:, None] * mlp, c)
    torch.testing.assert_close(seer(x, t, labels).velocity, expected, rtol=1e-5, atol=1e-5)


class Watched(TaylorSeer):
    """Keeps, per call, the batch and whether the call was full."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, bool]] = []

    def __call__(self, x, t, y):
        before = self.num_full
        output = super().__call__(x, t, y)
        self.seen.append((len(x), self.num_full > before))
        return output


def test_where_guidance_changes_the_batch_a_full_step_is_forced():
    """Guided from t = 1 down to 0.5; the eleven steps begin at t = 1, 10/11, ..., so steps 0 to 5 are guided."""
    noise, labels = small_noise()
    seer = Watched(small_sit(), interval=4, order=1)
    sample(seer, noise, labels, num_steps=11, cfg_scale=2.0, guidance_low=0.5, null_label=10)
    batches = [4] * 6 + [2] * 5
    full = [step in (0, 1, 5, 6, 10) for step in range(11)]  # 6 is forced, and the interval begins anew there
    assert seer.seen == list(zip(batches, full, strict=True))


def test_heun_runs_both_evaluations_of_a_step_alike():
    noise, labels = small_noise()
    seer = Watched(small_sit(), interval=3, order=1)
    sample(seer, noise, labels, num_steps=6, sampler="heun")
    by_step = [[True, True], [True, True], [False, False], [False, False], [True, True], [False]]
    assert [full for _, full in seer.seen] == [full for step in by_step for full in step]


def test_heun_with_a_short_interval_stays_close_to_the_full_run():
    """A skipped evaluation at a position that has just been seen in full is that snapshot: no step is lost in x."""
    model = small_sit().double()
    noise, labels = small_noise(dtype=torch.float64)
    full = sample(model, noise, labels, num_steps=40, sampler="heun")
    errors = []
    for order in (0, 1):
        cached = sample(TaylorSeer(model, 2, order), noise, labels, num_steps=40, sampler="heun")
        errors.append(((cached - full).norm() / (full - noise).norm()).item())
    assert errors[1] < errors[0] / 2 and errors[1] < 0.01


def test_every_run_begins_anew():
    model = small_sit()
    noise, labels = small_noise()
    seer = TaylorSeer(model, 3, 2)
    first = sample(seer, noise, labels, num_steps=10)
    sample(seer, -noise[:1], labels[:1], num_steps=12)  # another batch, another length, left behind
    assert torch.equal(sample(seer, noise, labels, num_steps=10), first)


def test_the_wrapped_model_is_left_as_it_was():
    model = small_sit()
    noise, labels = small_noise()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = sample(model, noise, labels, num_steps=5)
    attributes = set(vars(model)), [set(vars(block)) for block in model.blocks]
    sample(TaylorSeer(model, 2, 1), noise, labels, num_steps=5)
    assert (set(vars(model)), [set(vars(block)) for block in model.blocks]) == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(sample(model, noise, labels, num_steps=5), images)


def test_under_autocast_the_snapshots_are_bf16_and_the_tokens_float32():
    model = small_sit()
    noise, labels = small_noise()
    exact = sample(TaylorSeer(model, 3, 1), noise, labels, num_steps=10)
    with torch.autocast("cpu", torch.bfloat16):
        seer = TaylorSeer(model, 3, 1)
        images = sample(seer, noise, labels, num_steps=10)
    assert seer._ring.storage.dtype == torch.bfloat16
    assert (images - exact).norm() < 0.05 * (exact - noise).norm()


def test_settings_that_make_no_sense():
    model = small_sit()
    with pytest.raises(UserError, match="interval is 0"):
        TaylorSeer(model, interval=0)
    with pytest.raises(UserError, match="order is -1"):
        TaylorSeer(model, order=-1)
    with pytest.raises(UserError, match="interval is 9; it must not be above the number of steps, 8"):
        TaylorSeer(model, interval=9, num_steps=8)
    with pytest.raises(UserError, match="order is 4; 8 steps at interval 4 have 3 full ones, so it must be at most 2"):
        TaylorSeer(model, interval=4, order=4, num_steps=8)
    with pytest.raises(TypeError, match="model is a Linear; it must be a SiT"):
        TaylorSeer(torch.nn.Linear(2, 2))


def test_calls_outside_a_run():
    noise, labels = small_noise()
    seer = TaylorSeer(small_sit(), 2, 1)
    with pytest.raises(RuntimeError, match="no run has begun; call start"):
        seer(noise, torch.ones(2), labels)
    seer.start(3)
    for _ in range(3):
        seer(noise, torch.ones(2), labels)
    with pytest.raises(RuntimeError, match="this run had 3 evaluations and is over"):
        seer(noise, torch.ones(2), labels)
