"""Tiny pipelines of diffusers with random weights: no text encoder, prompts as embeddings, latents or arrays out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import randomize

diffusers = pytest.importorskip("diffusers")

TEXT = 8  # tokens of a prompt
SIZE = {"height": 64, "width": 64}


@dataclass
class Tiny:
    """A pipeline, the arguments of its call but num_inference_steps and generator, and what a test may change."""

    pipe: Any
    call: dict[str, Any]
    larger: dict[str, Any] = field(default_factory=lambda: {"height": 96, "width": 64})
    """Arguments of another size."""
    heun: Callable[[], Any] | None = None
    """Makes Heun's scheduler for this pipeline; None if it takes none, as those that pass sigmas."""

    @torch.no_grad()
    def __call__(self, steps: int = 12, seed: int = 0, **changes) -> Tensor:
        """The latents, or the images, of a run."""
        generator = torch.Generator().manual_seed(seed)
        call = {"output_type": "latent", **self.call, **changes}
        out = self.pipe(**call, num_inference_steps=steps, generator=generator, return_dict=False)[0]
        return torch.as_tensor(out)

    def prompt(self, tokens: int = TEXT, seed: int = 1, batch: int = 1) -> dict[str, Tensor]:
        """Arguments of another prompt, of another length or in another number, in place of those of `call`."""
        generator = torch.Generator().manual_seed(seed)
        changed = {}
        for name, value in self.call.items():
            if "prompt_embeds" in name and value.dim() == 3:
                changed[name] = torch.randn(batch, tokens, value.shape[2], generator=generator)
            elif "prompt_embeds" in name and value.dim() == 2 and "mask" not in name:
                changed[name] = torch.randn(batch, value.shape[1], generator=generator)
            elif "prompt" in name and "mask" in name:
                changed[name] = torch.ones(batch, tokens, dtype=value.dtype)
        return changed


def tiny_pipeline(name: str, heun: bool = False) -> Tiny:
    """The pipeline PIPELINES[name], silent, with its own scheduler or Heun's."""
    torch.manual_seed(0)
    tiny = PIPELINES[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    if heun:
        assert tiny.heun is not None
        tiny.pipe.scheduler = tiny.heun()
    return tiny


def _embeds(*shape: int) -> Tensor:
    return torch.randn(shape)


def _random(model: nn.Module) -> nn.Module:
    return randomize(model.eval())


def _vae(depth: int = 2) -> nn.Module:
    """Of 2^(depth − 1) pixels one latent, in both directions."""
    return _random(
        diffusers.AutoencoderKL(
            block_out_channels=[8] * depth, in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * depth, up_block_types=["UpDecoderBlock2D"] * depth,
            shift_factor=0.0,
        )
    )  # fmt: skip


def _flow_heun() -> Any:
    return diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)


def flux_transformer(**changes) -> nn.Module:
    shape = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return _random(diffusers.FluxTransformer2DModel(**{**shape, **changes}))


_NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def flux(cls: str = "FluxPipeline", true_cfg: bool = False) -> Tiny:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = getattr(diffusers, cls)(scheduler=scheduler, vae=None, transformer=flux_transformer(), **_NO_TEXT)
    call = {"prompt_embeds": _embeds(1, TEXT, 32), "pooled_prompt_embeds": _embeds(1, 32), **SIZE}
    if true_cfg:
        negative = {"negative_prompt_embeds": _embeds(1, TEXT, 32), "negative_pooled_prompt_embeds": _embeds(1, 32)}
        call |= {"true_cfg_scale": 4.0, **negative}
    return Tiny(pipe, call)


def flux_kontext() -> Tiny:
    """The image to edit is more tokens behind those of the latents."""
    tiny = flux("FluxKontextPipeline")
    tiny.pipe.vae = _vae(depth=4)  # of eight pixels one latent, as the pipeline thinks without one
    tiny.call |= {"image": torch.rand(1, 3, 64, 64), "max_area": 4096, "_auto_resize": False}
    tiny.larger = {"height": 96, "width": 64, "max_area": 96 * 64}
    return tiny


def flux_img2img() -> Tiny:
    """Begins in the middle of the schedule, at a strength of 0.7."""
    tiny = flux("FluxImg2ImgPipeline")
    tiny.pipe.vae = _vae(depth=4)  # of eight pixels one latent, as the pipeline thinks without one
    tiny.call |= {"image": torch.rand(1, 3, 64, 64), "strength": 0.7}
    return tiny


def sd3(**changes) -> Tiny:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=_random(transformer), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        **_NO_TEXT, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call = {
        "prompt_embeds": _embeds(1, TEXT, 32), "negative_prompt_embeds": _embeds(1, TEXT, 32),
        "pooled_prompt_embeds": _embeds(1, 64), "negative_pooled_prompt_embeds": _embeds(1, 64),
        **SIZE, "guidance_scale": 5.0,
    }  # fmt: skip
    return Tiny(pipe, {**call, **changes}, heun=_flow_heun)


def sd3_skip_layer() -> Tiny:
    """Skip-layer guidance is a call of its own, of some steps, in which a block does not run."""
    return sd3(skip_guidance_layers=[1], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=0.1,
               skip_layer_guidance_stop=0.6)  # fmt: skip


def pixart(scheduler: Any = None) -> Tiny:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=32, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=_random(transformer),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    call = {
        "prompt": None, "negative_prompt": None, "height": 16, "width": 16, "use_resolution_binning": False,
        "prompt_embeds": _embeds(1, TEXT, 32), "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_embeds": _embeds(1, TEXT, 32), "negative_prompt_attention_mask": torch.ones(1, TEXT),
    }  # fmt: skip
    return Tiny(pipe, call, {"height": 24, "width": 16}, None if scheduler else diffusers.HeunDiscreteScheduler)


def pixart_lcm() -> Tiny:
    """A consistency model, of few steps, whose scheduler adds noise."""
    return pixart(diffusers.LCMScheduler())


def dit() -> Tiny:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer=_random(transformer), vae=_vae(), scheduler=diffusers.DDIMScheduler())
    return Tiny(pipe, {"class_labels": [3], "output_type": "np"}, {}, diffusers.HeunDiscreteScheduler)


def wan(transformers: int = 1) -> Tiny:
    """With two transformers, as Wan 2.2, the first serves times above 0.7."""

    def transformer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=256, ffn_dim=32, num_layers=3, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip
        return randomize(model.eval(), seed)

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer(0),
        transformer_2=transformer(1) if transformers == 2 else None, boundary_ratio=0.7 if transformers == 2 else None,
    )  # fmt: skip
    call = {
        "prompt_embeds": _embeds(1, TEXT, 32), "negative_prompt_embeds": _embeds(1, TEXT, 32),
        "height": 32, "width": 32, "num_frames": 5,
    }  # fmt: skip
    return Tiny(pipe, call, {"height": 48, "width": 32}, _flow_heun)


def wan_2_2() -> Tiny:
    return wan(transformers=2)


def hunyuan_video() -> Tiny:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(transformer=_random(transformer), vae=None, scheduler=scheduler, **_NO_TEXT)
    call = {
        "prompt_embeds": _embeds(1, TEXT, 16), "prompt_attention_mask": torch.ones(1, TEXT),
        "pooled_prompt_embeds": _embeds(1, 8), "height": 32, "width": 32, "num_frames": 5,
    }  # fmt: skip
    return Tiny(pipe, call, {"height": 48, "width": 32})


def qwen_image() -> Tiny:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=_random(transformer)
    )
    ones = torch.ones(1, TEXT, dtype=torch.long)
    call = {
        "prompt_embeds": _embeds(1, TEXT, 16), "prompt_embeds_mask": ones,
        "negative_prompt_embeds": _embeds(1, TEXT, 16), "negative_prompt_embeds_mask": ones.clone(),
        "true_cfg_scale": 4.0, **SIZE,
    }  # fmt: skip
    return Tiny(pipe, call)


def sana() -> Tiny:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=_random(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    call = {
        "prompt": None, "negative_prompt": None, "height": 128, "width": 128, "use_resolution_binning": False,
        "prompt_embeds": _embeds(1, TEXT, 8), "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_embeds": _embeds(1, TEXT, 8), "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "complex_human_instruction": None,
    }  # fmt: skip
    return Tiny(pipe, call, {"height": 192, "width": 128}, _flow_heun)


def ltx() -> Tiny:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=3, caption_channels=32,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=_random(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    call = {
        "prompt_embeds": _embeds(1, TEXT, 32), "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_embeds": _embeds(1, TEXT, 32), "negative_prompt_attention_mask": torch.ones(1, TEXT),
        **SIZE, "num_frames": 9, "guidance_scale": 3.0,
    }  # fmt: skip
    return Tiny(pipe, call, {"height": 96, "width": 64})


def cogvideox() -> Tiny:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=3, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=_random(transformer),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": _embeds(1, TEXT, 32), "negative_prompt_embeds": _embeds(1, TEXT, 32),
        "height": 16, "width": 16, "num_frames": 9, "guidance_scale": 6.0,
    }  # fmt: skip
    return Tiny(pipe, call, {"num_frames": 5})


PIPELINES: dict[str, Callable[[], Tiny]] = {
    "flux": flux,
    "flux, true guidance": lambda: flux(true_cfg=True),
    "flux kontext": flux_kontext,
    "flux img2img": flux_img2img,
    "sd3": sd3,
    "sd3, skip-layer guidance": sd3_skip_layer,
    "pixart": pixart,
    "pixart, lcm": pixart_lcm,
    "dit": dit,
    "wan": wan,
    "wan 2.2": wan_2_2,
    "hunyuan video": hunyuan_video,
    "qwen image": qwen_image,
    "sana": sana,
    "ltx": ltx,
    "cogvideox": cogvideox,
}


class Spy:
    """Which model calls of a pipeline's runs were full, whatever a cache says.

    Attributes:
        evaluations: scheduler steps so far, in this run.
        ran: of each transformer, the evaluation of every call in which its first block ran.
        blocks: of each transformer, (evaluation, number of the block, over all its lists) of every block that ran.
    """

    def __init__(self, tiny: Tiny) -> None:
        self.ran: dict[str, list[int]] = {}
        self.blocks: dict[str, list[tuple[int, int]]] = {}
        self._watch_scheduler(tiny.pipe.scheduler)
        for name in ("transformer", "transformer_2"):
            if (model := getattr(tiny.pipe, name, None)) is not None:
                self._watch(name, model)
        self.clear()

    def clear(self) -> None:
        self.evaluations = 0
        self.ran = {name: [] for name in self.blocks}
        self.blocks = {name: [] for name in self.blocks}

    def _watch_scheduler(self, scheduler: Any) -> None:
        """By its class, as deepcopies of the scheduler share it but not what is counted here."""
        kind, spy = type(scheduler), self

        class Counted(kind):
            @functools.wraps(kind.step)  # pipelines look at the signature
            def step(self, *args, **kwargs):
                out = super().step(*args, **kwargs)
                spy.evaluations += self is scheduler
                return out

        Counted.__name__, Counted.__module__ = kind.__name__, kind.__module__
        scheduler.__class__ = Counted

    def _watch(self, name: str, model: nn.Module) -> None:
        self.blocks[name] = []
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        for number, block in enumerate(block for blocks in lists for block in blocks):
            # Of a module in the block: whatever stands in for the block has none of its own.
            next(child for child in block.children() if not isinstance(child, nn.ModuleList)).register_forward_hook(
                lambda *_, number=number: self._saw(name, number)
            )

    def _saw(self, name: str, number: int) -> None:
        self.blocks[name].append((self.evaluations, number))
        if number == 0:
            self.ran[name].append(self.evaluations)

    def full(self, name: str = "transformer") -> list[int]:
        """The evaluations in which the transformer's first block ran, each once."""
        return list(dict.fromkeys(self.ran[name]))
