"""Cached runs of FLUX and PixArt-α against golden ones; see golden/README.md."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import haste
import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parent / "golden"

# diffusers embeds times in float32, whose exp and cos differ in the last bit between instruction sets; at times up to
# 1,000 that is 1e-5 of an answer. The golden runs were made with AVX-512.
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
BOUND = 1e-6 if AVX512 else 2e-5


def floats(planes: np.ndarray) -> Tensor:
    """The float32 numbers of four planes of bytes, as float64."""
    return torch.from_numpy(np.ascontiguousarray(planes.T).view(np.float32)[:, 0].astype(np.float64))


class Golden:
    """A file: the model and its inputs in float64, and the runs."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(GOLDEN / name)
        meta = json.loads(str(self.arrays["meta"]))
        config = {key: tuple(v) if isinstance(v, list) else v for key, v in meta["config"].items()}
        self.model = getattr(diffusers, meta["cls"])(**config).double().eval()
        shapes = meta["weights"]
        flat = floats(self.arrays["weights"]).split([int(np.prod(shape)) for shape in shapes.values()])
        state = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), flat, strict=True)}
        self.model.load_state_dict(state)
        self.inputs = {key[3:]: self[key] for key in self.arrays.files if key.startswith("in:")}
        self.runs = meta["runs"]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="module")
def flux() -> Golden:
    return Golden("flux_taylorseer.npz")


@pytest.fixture(scope="module")
def pixart() -> Golden:
    return Golden("pixart_delta_dit.npz")


def relative(out: list[Tensor], planes: np.ndarray) -> float:
    answers = torch.stack(out)
    golden = floats(planes).reshape(answers.shape)
    return float((answers - golden).norm() / golden.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ("module_N6_O1_F3", {"cache": "taylor", "granularity": "module", "interval": 6, "order": 1}),
        ("module_N4_O2_F3", {"cache": "taylor", "granularity": "module", "interval": 4, "order": 2}),
        ("model_taylor_N6_O1_F3", {"cache": "taylor", "granularity": "model", "interval": 6, "order": 1}),
        ("model_newton_N6_O2_F3", {"cache": "newton", "granularity": "model", "interval": 6, "order": 2}),
    ],
)
def test_flux(flux, run, settings):
    sigma = flux["sigma"].tolist()
    fast = haste.enable_cache(flux.model, times=sigma[:-1], first_enhance=3, **settings)
    x, answers = flux["latents"], []
    for now, following in pairwise(sigma):
        time = torch.full((len(x),), now, dtype=x.dtype)
        answers.append(fast(hidden_states=x, timestep=time, return_dict=False, **flux.inputs)[0].clone())
        x = x + (following - now) * answers[-1]
    report = fast.report
    haste.disable_cache(flux.model)
    assert report.full_steps == flux.runs[run]["full_steps"]
    assert relative(answers, flux.arrays[run]) < BOUND


@torch.no_grad()
@pytest.mark.parametrize(("run", "steps", "gate"), [("delta20_N2", 20, 12), ("delta4_N2", 4, 2)])
def test_pixart(pixart, run, steps, gate):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas = torch.cumprod(1 - betas, 0).tolist()
    times = pixart[f"timesteps{steps}"].tolist()
    fast = haste.enable_cache(pixart.model, times=times, cache="delta-dit", interval=2, gate=gate, cached_blocks=6)
    sizes = {"resolution": None, "aspect_ratio": None}
    x, answers = pixart["latents"], []
    for now, following in pairwise([*times, None]):
        batch, time = torch.cat([x, x]), torch.full((2,), now)
        out = fast(batch, timestep=time, added_cond_kwargs=sizes, return_dict=False, **pixart.inputs)[0]
        answers.append(out.clone())
        null, prompt = out[:, :4].chunk(2)
        noise = null + 4.5 * (prompt - null)
        here, there = alphas[now], 1.0 if following is None else alphas[following]
        clean = (x - (1 - here) ** 0.5 * noise) / here**0.5
        x = there**0.5 * clean + (1 - there) ** 0.5 * noise  # DDIM, eta 0
    report = fast.report
    haste.disable_cache(pixart.model)
    assert report.full_steps == pixart.runs[run]["full_steps"]
    assert relative(answers, pixart.arrays[run]) < BOUND
