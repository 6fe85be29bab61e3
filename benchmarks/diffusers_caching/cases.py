"""Small models with random weights and the shapes of the real ones, and the sampling loop of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from haste.errors import UserError
from torch import Tensor, nn

NUM_STEPS = 28
# One full step in six after the first three, by diffusers' own rule, which takes no list: every cache here follows it.
FULL_STEPS = (0, 1, 2, 4, 10, 16, 22)

Model = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One transformer, its inputs, and a loop that samples with it.

    Args:
        model: the transformer, in float32 on the CPU.
        latents: the noise that every run begins with.
        inputs: the other arguments of every call.
        modules: what TaylorSeer caches per module, as regular expressions over the names of modules.
        skipped: what is then left out, likewise.
        guidance: above 1: [null, condition] in one batch.
        rule: of the sampler: flow (Euler, shift 3) or ddim.
    """

    name: str
    model: nn.Module
    latents: Tensor
    inputs: dict[str, Any]
    modules: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    guidance: float = 1.0
    rule: str = "flow"

    @property
    def time_scale(self) -> float:
        """FLUX is called with times from 0 to 1, the others with 0 to 1000."""
        return 1e-3 if isinstance(self.model, diffusers.FluxTransformer2DModel) else 1.0

    def scheduler(self, num_steps: int) -> Any:
        if self.rule == "flow":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            scheduler = diffusers.DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(num_steps)
        return scheduler

    def times(self, num_steps: int = NUM_STEPS) -> list[float]:
        """The time of every call of the model."""
        return [float(t * self.time_scale) for t in self.scheduler(num_steps).timesteps]

    @torch.no_grad()
    def sample(self, model: Model, num_steps: int = NUM_STEPS, after_step: Callable[[], object] = int) -> Tensor:
        """Sample with `model`, which is called as the transformer is; returns the final latents."""
        x, guided, scheduler = self.latents, self.guidance > 1, self.scheduler(num_steps)
        for t in scheduler.timesteps:
            rows = torch.cat([x, x]) if guided else x
            time = (t * self.time_scale).expand(len(rows))
            out = model(hidden_states=rows, timestep=time, return_dict=False, **self.inputs)[0]
            out = out[:, : x.shape[1]]  # DiT and PixArt predict a variance too
            if guided:
                null, condition = out.chunk(2)
                out = null + self.guidance * (condition - null)
            x = scheduler.step(out, t, x, return_dict=False)[0]
            after_step()
        return x


def make_flux(width: int = 384, tokens: int = 256, text: int = 64) -> Case:
    side = int(tokens**0.5)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, num_attention_heads=width // 64,
        attention_head_dim=64, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    places = torch.zeros(side, side, 3)
    places[..., 1], places[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    inputs = {
        "encoder_hidden_states": torch.randn(1, text, 128),
        "pooled_projections": torch.randn(1, 64),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((1,), 3.5),
    }
    name = f"FLUX, 2 + 4 blocks, width {width}, {tokens} + {text} tokens"
    return Case(name, model, torch.randn(1, tokens, 16), inputs, *MM_DIT)


def make_dit(width: int = 384, size: int = 32) -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=6,
        sample_size=size, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    name = f"DiT, 6 blocks, width {width}, {size**2 // 4} tokens, batch 2"
    modules = (r"transformer_blocks\.\d+\.(attn1|ff)",)
    return Case(
        name, model, torch.randn(2, 4, size, size), {"class_labels": torch.tensor([0, 1])}, modules, rule="ddim"
    )


def make_pixart(width: int = 256, size: int = 32, text: int = 77) -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=6,
        cross_attention_dim=width, sample_size=size, patch_size=2, caption_channels=128, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "encoder_hidden_states": torch.randn(2, text, 128),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    name = f"PixArt, 6 blocks, width {width}, {size**2 // 4} tokens, {text} of text, guided in one batch"
    modules = (r"transformer_blocks\.\d+\.(attn1|attn2|ff)",)
    return Case(name, model, torch.randn(1, 4, size, size), inputs, modules, guidance=4.5, rule="ddim")


def make_hunyuan_video(width: int = 384, frames: int = 4, size: int = 16, text: int = 32) -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=width // 64, attention_head_dim=64, num_layers=2,
        num_single_layers=4, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=128, pooled_projection_dim=64, rope_axes_dim=(16, 24, 24), image_condition_type=None,
    )  # fmt: skip
    inputs = {
        "encoder_hidden_states": torch.randn(1, text, 128),
        "encoder_attention_mask": (torch.arange(text) < text - 8)[None].long(),
        "pooled_projections": torch.randn(1, 64),
        "guidance": torch.full((1,), 6000.0),
    }
    name = f"HunyuanVideo, 2 + 4 blocks, width {width}, {frames * size**2 // 4} + {text} tokens"
    return Case(name, model, torch.randn(1, 4, frames, size, size), inputs, *MM_DIT)


# A double block's attention and MLPs of both streams; of a single block the projection of both, which makes its
# attention and the first half of its MLP needless.
MM_DIT = (
    (r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"),
    (r"single_transformer_blocks\.\d+\.(attn|proj_mlp|act_mlp)",),
)
MAKERS: dict[str, Callable[..., Case]] = {
    "flux": make_flux,
    "dit": make_dit,
    "pixart": make_pixart,
    "hunyuan-video": make_hunyuan_video,
}


def make_case(name: str, **sizes: int) -> Case:
    """A case by its name; sizes: its keyword arguments, for smaller ones.

    Raises:
        UserError: an unknown name.
    """
    if name not in MAKERS:
        raise UserError(f"--model must be of {', '.join(MAKERS)}, got {name}")
    torch.manual_seed(0)
    case = MAKERS[name](**sizes)
    case.model.eval().requires_grad_(False)
    return case
