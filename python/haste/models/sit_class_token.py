"""REG's SiT (arXiv 2507.01467): the class token of a vision encoder is denoised along with the image.

The token is noised at the image's time, embedded as one more token in front of the image's, without a position, read
and written by every block, and its velocity is predicted by a layer of its own. Parameters have the public names.

Image and token are one vector, the image's C·S·S numbers and then the token's K. So samplers, guidance and caches,
which go number by number, hold for both without knowing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.models.family import ModelOutput
from haste.models.layers import FinalLayer, initialize_linear, modulate, unpatchify
from haste.models.sit import SiT


class Joint(NamedTuple):
    """The two parts of a state, or of its velocity: of the image (B, C, S, S), and of the class token (B, K)."""

    image: Tensor
    token: Tensor


def join(x: Tensor, token: Tensor) -> Tensor:
    """Images (B, C, S, S) and class tokens (B, K) as one state, (B, C·S·S + K), in the images' type."""
    return torch.cat([x.flatten(1), token.to(x)], dim=1)


def split(state: Tensor, image_shape: Sequence[int]) -> Joint:
    """The parts of a state (B, C·S·S + K), of images of shape (C, S, S)."""
    size = prod(image_shape)
    return Joint(state[:, :size].unflatten(1, tuple(image_shape)), state[:, size:])


class ClassTokenFinalLayer(nn.Module):
    """SiT's last layer with a linear map of its own for the class token, which is the first token.

    Args:
        layer: SiT's, whose parts it takes over. token_values: numbers of the class token.
    """

    def __init__(self, layer: FinalLayer, token_values: int) -> None:
        super().__init__()
        self.norm_final = layer.norm_final
        self.linear = layer.linear
        self.linear_cls = nn.Linear(layer.linear.in_features, token_values)  # here, as in the public checkpoints' order
        self.adaLN_modulation = layer.adaLN_modulation

    def forward(self, tokens: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, width) to patches (B, N, P·P·C) and class tokens (B, K)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        tokens = modulate(self.norm_final(tokens), shift, scale)
        return self.linear(tokens[:, 1:]), self.linear_cls(tokens[:, 0])


class ClassTokenSiT(SiT):
    """A SiT that predicts the velocities of an image and of its class token, both at time t.

    model(x, t, y) takes the states (B, C·S·S + K) that `join` makes, and predicts such. What it returns of q and k has
    the class token in front, a prefix of one; the projectors read it as the image's tokens, as in REG.

    Args:
        cls_token_dim: numbers K of the class token, the teacher's width.
        others: those of SiT.
    """

    def __init__(self, *, cls_token_dim: int, **others: Any) -> None:
        if others.get("projection_layer_type", "mlp") != "mlp":
            raise UserError("projection_layer_type must be mlp for a model with a class token, which has no neighbours "
                            f"to convolve, got {others['projection_layer_type']}")  # fmt: skip
        super().__init__(**others)
        self.cls_token_dim = cls_token_dim
        width = self.pos_embed.shape[2]
        with torch.random.fork_rng(devices=[]):  # the other weights do not depend on whether there is a class token
            self.final_layer = ClassTokenFinalLayer(self.final_layer, cls_token_dim)
            self.cls_projectors2 = nn.Linear(cls_token_dim, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
            initialize_linear(self.cls_projectors2)
        nn.init.zeros_(self.final_layer.linear_cls.weight)
        nn.init.zeros_(self.final_layer.linear_cls.bias)
        positions = torch.cat([torch.zeros_like(self.pos_embed[:, :1]), self.pos_embed], dim=1)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the image in a state."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (prod(self.image_shape) + self.cls_token_dim,)

    def tokens(self, x: Tensor) -> Tensor:
        """States (B, C·S·S + K) to tokens (B, 1 + N, width), the class token first."""
        image, token = split(x, self.image_shape)
        embedded = self.wg_norm(self.cls_projectors2(token)).unsqueeze(1)
        patches = self.x_embedder(image)
        return torch.cat([embedded.to(patches), patches], dim=1) + self.pos_embed

    def finish(self, tokens: Tensor, c: Tensor) -> Tensor:
        """The last tokens (B, 1 + N, width) and the conditioning to the velocity of the state (B, C·S·S + K)."""
        patches, token = self.final_layer(tokens, c)
        return join(unpatchify(patches, self.patch_size), token)

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().forward(*args, **kwargs)
        return output._replace(prefix=1, tokens=None if output.tokens is None else output.tokens[:, 1:])
