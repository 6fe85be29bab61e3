"""REPA's and HASTE's losses, with a teacher by name, on a model that haste does not know.

Pass --enc-type dinov2-vit-b --resolution 256; without, the teacher is a small DINOv2 with random weights.
"""

import argparse
import tempfile

import torch
from haste.alignment import Aligner, LayerMap
from haste.models import ModelOutput
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model


class YourModel(nn.Module):
    """One attention layer on patches of 16 pixels, and a projector onto the width of the teacher's features."""

    def __init__(self, teacher_width: int, dim: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(3, dim, 16, 16), nn.Linear(dim, 3 * dim)
        self.project, self.heads = nn.Linear(dim, teacher_width), heads

    def forward(self, images: Tensor) -> ModelOutput:
        x = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return ModelOutput(x, queries_keys=[(q, k)], projections=[self.project(x)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--enc-type")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.enc_type is None:
            config = Dinov2Config(hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
            Dinov2Model(config).save_pretrained(folder)
        layer_map = LayerMap.parse("0:2")  # your layer 0 learns the attention of the teacher's layer 2
        teacher = args.enc_type or folder
        aligner = Aligner.from_pretrained([teacher], layer_map, args.resolution // 16, proj_coeff=0.5, attn_coeff=0.5)
    model = YourModel(aligner.z_dims[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.rand(4, 3, args.resolution, args.resolution) * 2 - 1  # in [-1, 1]
    for step in range(args.steps):
        loss, losses = aligner(model(images), images)  # add your own loss to it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: attention {losses.attention.item():.4f}, features {losses.feature.item():.4f}")


main()
