"""A SiT that denoises a class token: REG's names, its forward pass and its sampler once more, caches, refusals."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from haste.caching import CacheConfig, CachedModel
from haste.errors import UserError
from haste.generation.loaded import load_checkpoint
from haste.models import ClassTokenSiT, build_model, check_config, get_family, join, split
from haste.samplers import Solver, sample
from haste.transport import interpolate
from public_names import plain_forward

CONFIG = {
    "input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2,
    "num_classes": 5, "encoder_depth": 1, "projector_dim": 8, "cls_token_dim": 6,
}  # fmt: skip
IMAGE, NUMBERS = (3, 4, 4), 48
NULL, LABELS = 5, torch.tensor([1, 4, 0])


def random_model(dtype: torch.dtype = torch.float64, z_dims=(6,), **changes) -> ClassTokenSiT:
    """One in which no trained parameter is zero."""
    torch.manual_seed(0)
    model = build_model({**CONFIG, **changes}, z_dims)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def random_state(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, NUMBERS + 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the model ----


def test_names_shapes_and_order_of_parameters_are_regs():
    """An optimizer's state in a public checkpoint refers to parameters by their number."""
    with torch.device("meta"):
        model = build_model({**get_family("sit").sizes["SiT-B/2"], "input_size": 32, "cls_token_dim": 768}, (768,))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["pos_embed"] == (1, 257, 768)
    assert shapes["cls_projectors2.weight"] == (768, 768) and shapes["wg_norm.weight"] == (768,)
    assert shapes["final_layer.linear_cls.weight"] == (768, 768) and shapes["final_layer.linear.weight"] == (16, 768)
    names = [name for name, _ in model.named_parameters()]
    groups = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert groups == ["pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projectors", "final_layer",
                      "cls_projectors2", "wg_norm"]  # fmt: skip
    last = list(dict.fromkeys(name.split(".")[1] for name in names if name.startswith("final_layer")))
    assert last == ["linear", "linear_cls", "adaLN_modulation"]


LIGHTNING = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}


@pytest.mark.parametrize("parts", [{}, LIGHTNING])
def test_forward_is_what_the_paper_says(parts):
    """With LightningDiT's parts, too, of which rotary positions leave the class token as it is."""
    model, state, t = random_model(**parts), random_state(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    image, token = plain_forward(model.state_dict(), state[:, :NUMBERS].view(3, *IMAGE), t, LABELS, 2, 2,
                                 token=state[:, NUMBERS:])  # fmt: skip
    output = model(state, t, LABELS, aligned_layers=(1,), project=True)
    predicted = split(output.prediction, IMAGE)
    torch.testing.assert_close(predicted.image, image, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(predicted.token, token, rtol=1e-10, atol=1e-10)
    # The class token is in front: a prefix of q and k, and projected as the image's four tokens are.
    assert output.prefix == 1 and output.queries_keys[0][0].shape == (3, 2, 5, 8)
    assert output.projections[0].shape == (3, 5, 6)


def test_the_token_has_no_position_and_other_weights_are_those_of_a_model_without_it():
    torch.manual_seed(0)
    with_token = build_model(CONFIG, (6,))
    after = torch.rand(3)
    torch.manual_seed(0)
    without = build_model({**CONFIG, "cls_token_dim": 0}, (6,))
    assert torch.equal(after, torch.rand(3))
    own = with_token.state_dict()
    for name, value in without.state_dict().items():
        assert torch.equal(own[name][:, 1:] if name == "pos_embed" else own[name], value), name
    assert not own["pos_embed"][:, 0].any() and not own["final_layer.linear_cls.weight"].any()
    assert not with_token(random_state().float(), torch.rand(3), LABELS).prediction.any()


def test_losses_are_of_each_part():
    family, model = get_family("sit"), random_model()
    x, token = torch.randn(3, *IMAGE, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    noise, t = random_state(), torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)
    x_t, target = family.interpolate(model, join(x, token), noise, t, "linear")
    assert torch.equal(x_t, join(x, token) * (1 - t[:, None]) + noise * t[:, None])
    predicted = model(x_t, t, LABELS).prediction
    of_image = predicted[:, :NUMBERS] - (noise[:, :NUMBERS] - x.flatten(1))
    of_token = predicted[:, NUMBERS:] - (noise[:, NUMBERS:] - token)
    assert family.loss(predicted, target).item() == pytest.approx(of_image.square().mean().item(), rel=1e-12)
    assert family.class_token_loss(predicted, target).item() == pytest.approx(
        of_token.square().mean().item(), rel=1e-12
    )
    vanilla = interpolate(x, x, t)[1]
    assert family.class_token_loss(x, vanilla) is None


# ---- sampling ----


def public_sampler(model, image, token, step_noise, scale, token_scale, low, high, steps):
    """REG's Euler-Maruyama with two states and two guidance scales, in double precision, from its formulas."""
    grid = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
    weights = model.state_dict()
    for step, (t, after) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        drifts = []
        for labels in (LABELS, torch.full_like(LABELS, NULL)):
            velocities = plain_forward(weights, image, torch.full((3,), t, dtype=torch.float64), labels, 2, 2, token)
            pair = []
            for v, x in zip(velocities, (image, token), strict=True):
                score = -((1 - t) * v + x) / t  # of the linear path
                pair.append(v - t * score)
            drifts.append(pair)
        moved = []
        for part, (x, own) in enumerate(((image, scale), (token, token_scale))):
            cond, uncond = drifts[0][part], drifts[1][part]
            guided = low <= t <= high and own > 0
            drift = uncond + own * (cond - uncond) if guided else cond
            x = x + (after - t) * drift
            if step < steps - 1:
                x = x + (2 * t * (t - after)) ** 0.5 * step_noise[step][part]
            moved.append(x)
        image, token = moved
    return image


@pytest.mark.parametrize("token_scale", [2.5, 1.5, 0.0])
def test_sampling_is_regs_of_two_states(token_scale):
    model, state, kicks = random_model(z_dims=()), random_state(), [random_state(10 + step) for step in range(3)]
    split_kicks = [split(kick, IMAGE) for kick in kicks]
    expected = public_sampler(model, *split(state, IMAGE), split_kicks, 2.5, token_scale, 0.1, 0.8, steps=4)
    own = {} if token_scale == 2.5 else {"guided_channels": NUMBERS, "others_scale": token_scale or 1.0}
    seen = []
    solve = Solver(num_steps=4, sampler="euler-maruyama", cfg_scale=2.5, guidance_low=0.1, guidance_high=0.8, null=NULL,
                   step_noise=kicks, observe=lambda step, x: seen.append(x.shape[1:]), **own)  # fmt: skip
    sampled = get_family("sit").sample(model, state, LABELS, solve)
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)
    assert seen == [IMAGE] * 4


TAYLOR = {"cache": "taylor", "order": 1, "interval": 2, "first_enhance": 2}


@pytest.mark.parametrize(
    "settings",
    [{**TAYLOR, "granularity": name} for name in ("module", "block", "model", "output")]
    + [{"cache": "delta-dit", "interval": 2, "cached_blocks": 1}],
)
def test_caches_hold_for_both_states(settings):
    """A full step is the model's own, and a forecast step, of what barely changes in 1/40 of the time, is near it."""
    model, state = random_model(torch.float32, ()), random_state().float()
    expected = sample(model, state, LABELS, num_steps=40, cfg_scale=2, null=NULL)
    cached = CachedModel(model, CacheConfig(**settings))
    states = []
    solve = Solver(num_steps=40, cfg_scale=2, null=NULL, observe=lambda step, x: states.append(x))
    image = get_family("sit").sample(cached, state, LABELS, solve)
    assert cached.num_forecast > 10 and image.shape == states[0].shape == (3, *IMAGE)
    wanted = split(expected, IMAGE).image
    assert 0 < (image - wanted).norm() / wanted.norm() < 0.1


# ---- files, refusals ----


def test_a_checkpoint_of_regs_trainer_is_read_from_its_weights(tmp_path, monkeypatch):
    """Which records its own settings alone, among them cls, the coefficient."""
    size = {name: CONFIG[name] for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    monkeypatch.setitem(get_family("sit").sizes, "SiT-B/2", size)
    weights = {name: value.float() for name, value in random_model().state_dict().items()}
    args = Namespace(model="SiT-B/2", cls=0.03, enc_type="dinov2-vit-b", proj_coeff=0.5, encoder_depth=1, cfg_prob=0.1,
                     num_classes=5, path_type="linear", prediction="v", resolution=256, exp_name="reg")  # fmt: skip
    torch.save({"model": weights, "ema": weights, "opt": {}, "args": args, "steps": 7}, tmp_path / "0000007.pt")
    loaded = load_checkpoint(tmp_path / "0000007.pt", device="cpu")
    assert loaded.layout.class_token == 6 and loaded.layout.input_shape == IMAGE
    assert loaded.layout.noise_shape == (NUMBERS + 6,) and loaded.model_config["cls_token_dim"] == 6
    state, t = random_state().float(), torch.rand(3)
    assert torch.equal(loaded.model(state, t, LABELS).prediction, random_model(torch.float32)(state, t, LABELS)[0])


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="projection_layer_type"):
        build_model({**CONFIG, "projection_layer_type": "conv"})
    with pytest.raises(UserError, match="cls_token_dim must be 0 for DiT"):
        build_model({"family": "dit", **CONFIG})
    with pytest.raises(UserError, match="cls_token_dim"):
        check_config({**CONFIG, "cls_token_dim": -1}, "file")
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 54\), got \(3, 3, 4, 4\)"):
        random_model()(torch.zeros(3, *IMAGE), torch.rand(3), LABELS)
