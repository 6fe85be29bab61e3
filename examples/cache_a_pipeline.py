"""Cache a pipeline of diffusers: seconds, difference from the uncached image, and what the cache did.

Usage:
    python examples/cache_a_pipeline.py FOLDER_OR_HUB_ID --prompt "a red cat" --num-steps 50
    python examples/cache_a_pipeline.py     # a small FLUX with random weights, which runs anywhere in seconds
"""

from __future__ import annotations

import argparse
import time

import haste
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

NO_TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None, "vae": None}


def small_pipeline() -> tuple[FluxPipeline, dict]:
    """FLUX of six blocks without text encoders and VAE: its images are latents, its prompt random numbers."""
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, num_attention_heads=4, attention_head_dim=64,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    pipe = FluxPipeline(transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **NO_TEXT)
    prompt = {"prompt_embeds": torch.randn(1, 32, 64), "pooled_prompt_embeds": torch.randn(1, 64)}
    return pipe, {**prompt, "height": 256, "width": 256, "output_type": "latent"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", help="a folder that save_pretrained wrote, or a name on the hub")
    parser.add_argument("--prompt", default="a photo of a red cat on a hill")
    parser.add_argument("--num-steps", type=int, default=28)
    args = parser.parse_args()
    if args.pipeline:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=dtype).to(device)
        call = {"prompt": args.prompt, "output_type": "np"}
    else:
        pipe, call = small_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def sample(name: str) -> np.ndarray:
        begin, noise = time.perf_counter(), torch.Generator().manual_seed(0)
        images = pipe(**call, num_inference_steps=args.num_steps, generator=noise)[0]
        print(f"{name}: {time.perf_counter() - begin:.2f} s")
        return np.asarray(images)

    uncached = sample("uncached")
    with haste.cached(pipe) as fast:
        cached = sample("cached")
    print(f"relative error {np.linalg.norm(cached - uncached) / np.linalg.norm(uncached):.1e}\n{fast.report}")


if __name__ == "__main__":
    main()
