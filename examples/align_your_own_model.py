"""REPA's and HASTE's losses, with a teacher by name, on a model that haste does not know.

    python examples/align_your_own_model.py --enc-type dinov2-vit-b --resolution 256

Without --enc-type the teacher is a small DINOv2 with random weights, so that nothing is downloaded.
"""

import argparse
import tempfile

import torch
from haste import Aligner
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model


class YourModel(nn.Module):
    """One attention layer on patches of 16 pixels, and a projector onto the width of the teacher's features."""

    def __init__(self, teacher_width: int, dim: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(3, dim, 16, 16), nn.Linear(dim, 3 * dim)
        self.project, self.heads = nn.Linear(dim, teacher_width), heads

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.project(x), q, k


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
        # Your layer 0 learns the attention of the teacher's layer 2.
        aligner = Aligner.from_pretrained(args.enc_type or folder, "0:2", grid=args.resolution // 16)
    model = YourModel(aligner.z_dims[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.rand(4, 3, args.resolution, args.resolution) * 2 - 1  # in [-1, 1]
    for step in range(args.steps):
        projected, q, k = model(images)
        losses = aligner.losses([(q, k)], [projected], aligner.teacher_outputs(images))
        optimizer.zero_grad()
        aligner.weigh(losses).backward()  # add your own loss to it
        optimizer.step()
        print(f"step {step}: attention {losses.attention.item():.4f}, features {losses.feature.item():.4f}")


main()
