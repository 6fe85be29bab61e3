"""The classes of blocks whose modules can be forecast one by one: what is cached of each, and its gates at a time.

A residual block adds gate(t) ⊙ F(x) for each of its modules. What stands here of a class is which of its submodules are
the F: attention after its output projection and the MLP, of the image's stream, before their gates; and how the gates
follow from what the block is called with. Classes are named, so that nothing has to be imported.

The text stream of a two-stream block is left out: on a forecast step nothing that reaches the image reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

# ---- what a block is called with ----


class Arguments(dict[str, Any]):
    """The arguments of a block by name, those alone that were passed."""

    @classmethod
    def of(cls, block: nn.Module, args: tuple, kwargs: dict[str, Any], activations: Activations) -> Arguments:
        arguments = cls(zip(_names(block.__class__), args, strict=False))
        arguments.update(kwargs)
        arguments.activations = activations
        return arguments

    activations: Activations


@lru_cache(maxsize=256)
def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    names = tuple(inspect.signature(cls.forward).parameters)[1:]
    return STREAMS if names == ("args", "kwargs") else names  # as public MM-DiT hands them on


STREAMS = ("context", "x", "c")


class Activations:
    """What modules without weights make of the conditioning: in one forward pass the blocks compute the same of it."""

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor, module: nn.Module) -> Tensor:
        """module(x), by a module that its class and its attributes describe, such as nn.SiLU."""
        settings = ((name, value) for name, value in vars(module).items() if not name.startswith("_"))
        key = (id(x), type(module), *settings)
        if key not in self._made:
            self._made[key] = x, module(x)  # x too: while it lives, no other tensor has its id
        return self._made[key][1]


def pieces(linear: nn.Module, x: Tensor, of: int, which: Sequence[int]) -> list[Tensor]:
    """Some of the `of` equal pieces of linear(x), (B, D) each; of a plain layer, only their weights are read.

    At small batches that is what these layers' time goes to.
    """
    if not _is_plain(linear):
        chunks = linear(x).chunk(of, dim=-1)
        return [chunks[index] for index in which]
    weight, bias = linear.weight, linear.bias
    moved = x.to(weight.device)  # another device than x's while diffusers keeps the block's weights elsewhere
    size = weight.shape[0] // of
    rows = [slice(size * index, size * index + size) for index in which]
    made = [F.linear(moved, weight[part], None if bias is None else bias[part]) for part in rows]
    return made if moved is x else [piece.to(x.device) for piece in made]


def _is_plain(linear: nn.Module) -> bool:
    """A linear layer as torch makes it: no adapter, quantisation, sharding, hook or offloading."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return plain and not hooks and not linear.weight.is_meta


class PerTokenError(ValueError):
    """A modulation that differs from token to token; the message says of what."""


def _one_time(x: Tensor, count: int, dim: int) -> Tensor:
    """A modulation as (B, count, dim)."""
    if x.shape[0] * count * dim != x.numel():
        raise PerTokenError("whose modulation differs from token to token")
    return x.reshape(-1, count, dim)


# ---- classes of blocks ----

Gates = Callable[[Any, Arguments], Sequence[Tensor | None]]


@dataclass(frozen=True)
class BlockClass:
    """What is cached of a class of blocks.

    Attributes:
        modules: paths of the cached submodules. Of a tuple that one returns the first tensor is the image's, and of
            several calls in a block the first. One that a block lacks is left out.
        gates: (block, arguments) → for each of `modules` its gate, (B, D); None where there is none.
        returns: the arguments that come back changed, in the order in which the block returns them; a single one comes
            back bare.
        tokens: which argument are the image's tokens, alone or joined with the text's.
        text_first: where image and text are one sequence, the text stands before the image.
        channels_first: what a convolution returns is (B, D, …), not (B, …, D).
        tables: with it, a gate is what `gates` gives, the same for all blocks of the class, plus a constant of the
            block: block → for each of `modules` its constant, (D,); 1 where nothing else gates, None where it has none.
    """

    modules: tuple[str, ...]
    gates: Gates
    returns: tuple[str, ...] = ("hidden_states",)
    tokens: str = "hidden_states"
    text_first: bool = True
    channels_first: bool = False
    tables: Callable[[Any], Sequence[Tensor | float | None]] | None = None


def _modulation(norm: str, of: int, which: Sequence[int], argument: str = "temb", activation: str = "silu") -> Gates:
    """The gates are pieces of norm.linear(silu(temb))."""

    def gates(block: Any, a: Arguments) -> list[Tensor | None]:
        layer = getattr(block, norm)
        activated = a.activations.of(a[argument], getattr(layer, activation)) if activation else a[argument]
        return list(pieces(layer.linear, activated, of, which))

    return gates


def _sequential(path: str, of: int, which: Sequence[int], argument: str = "temb") -> Gates:
    """The gates are pieces of a linear layer at the end of a sequence, after an activation or nothing."""
    sequence = attrgetter(path)

    def gates(block: Any, a: Arguments) -> list[Tensor | None]:
        *activation, linear = sequence(block)
        x = a.activations.of(a[argument], activation[0]) if activation else a[argument]
        return list(pieces(linear, x, of, which))

    return gates


def _each(*gates: Gates) -> Gates:
    """One after the other."""
    return lambda block, a: [gate for one in gates for gate in one(block, a)]


def _tanh(gates: Gates) -> Gates:
    return lambda block, a: [gate if gate is None else gate.tanh() for gate in gates(block, a)]


def _dit(block: Any, a: Arguments) -> list[Tensor | None]:
    embedder = block.norm1.emb  # each block has its own
    projected = a.activations.of(a["timestep"], embedder.time_proj).to(a["hidden_states"].dtype)
    emb = embedder.timestep_embedder(projected) + embedder.class_embedder(a["class_labels"])
    return list(pieces(block.norm1.linear, block.norm1.silu(emb), 6, (2, 5)))


def _sd3(block: Any, a: Arguments) -> list[Tensor | None]:
    activated = a.activations.of(a["temb"], block.norm1.silu)
    if not block.use_dual_attention:
        return [*pieces(block.norm1.linear, activated, 6, (2, 5)), None]
    return list(pieces(block.norm1.linear, activated, 9, (2, 5, 8)))


def _qwen(block: Any, a: Arguments) -> Sequence[Tensor | None]:
    if a.get("modulate_index") is not None:
        raise PerTokenError("whose modulation differs between the image and its references")
    return _sequential("img_mod", 6, (2, 5))(block, a)


def _nucleus(block: Any, a: Arguments) -> list[Tensor | None]:
    made = _sequential("img_mod", 4, (1, 3))(block, a)
    return [gate if gate is None else gate.clamp(-2.0, 2.0).tanh() for gate in made]


def _z_image(block: Any, a: Arguments) -> Sequence[Tensor | None]:
    if a.get("noise_mask") is not None:
        raise PerTokenError("whose modulation differs between noisy and clean tokens")
    return _tanh(_sequential("adaLN_modulation", 4, (1, 3), "adaln_input"))(block, a)


def _hidream(block: Any) -> BlockClass:
    """A shell around a two-stream or a joint block."""
    if not hasattr(block.block, "ff_t"):
        return HIDREAM
    return replace(HIDREAM, gates=_sequential("block.adaLN_modulation", 12, (2, 5)), returns=IMAGE_TEXT)


def _chroma(which: Sequence[int]) -> Gates:
    """temb (B, 3 … 12, D) has the modulation itself, the image's first."""
    return lambda block, a: [a["temb"][:, index] for index in which]


def _shared(argument: str, which: Sequence[int | None]) -> Gates:
    """The gates are vectors of an argument of six, the same one for all blocks."""

    def gates(block: Any, a: Arguments) -> list[Tensor | None]:
        e = _one_time(a[argument], 6, a["hidden_states"].shape[-1])
        return [None if index is None else e[:, index] for index in which]

    return gates


def _adaln_single(argument: str, modules: tuple[str, ...], table: str = "scale_shift_table") -> BlockClass:
    """PixArt's adaLN-single (arXiv 2310.00426): self-attention, cross-attention without a gate, MLP."""
    which = (2, 5) if len(modules) == 2 else (2, None, 5)
    parameter = attrgetter(table)

    def tables(block: Any) -> list[Tensor | float | None]:
        constants = parameter(block).reshape(6, -1)
        return [1.0 if index is None else constants[index] for index in which]

    return BlockClass(modules, _shared(argument, which), tables=tables)


def _flux2(argument: str, of: int, modules: tuple[str, ...], returns: tuple[str, ...]) -> BlockClass:
    """FLUX.2's blocks share their modulation, without a table: shift, scale and gate of each module."""

    def gates(block: Any, a: Arguments) -> list[Tensor | None]:
        e = _one_time(a[argument], of, a["hidden_states"].shape[-1])
        return [e[:, 3 * number + 2] for number in range(len(modules))]

    return BlockClass(modules, gates, returns, tables=lambda block: [None] * len(modules))


TEXT_IMAGE, IMAGE_TEXT = ("encoder_hidden_states", "hidden_states"), ("hidden_states", "encoder_hidden_states")

DOUBLE = BlockClass(("attn", "ff"), _modulation("norm1", 6, (2, 5)), TEXT_IMAGE)
SINGLE = BlockClass(("proj_out",), _modulation("norm", 3, (2,)), TEXT_IMAGE)
JOINT = replace(SINGLE, returns=("hidden_states",))
HUNYUAN_DOUBLE = replace(DOUBLE, returns=IMAGE_TEXT, text_first=False)
HUNYUAN_SINGLE = replace(SINGLE, returns=IMAGE_TEXT, text_first=False)
COGVIEW = BlockClass(("attn1", "ff"), _modulation("norm1", 12, (4, 10), activation=""), IMAGE_TEXT)
VIDEO = _adaln_single("temb", ("attn1", "attn2", "ffn"))
TEXT = BlockClass((), lambda block, a: [])  # a block of the text's stream, which no forecast reads
LUMINA = BlockClass(("norm2", "ffn_norm2"), _tanh(_modulation("norm1", 4, (1, 3))))
Z_IMAGE = BlockClass(("attention_norm2", "ffn_norm2"), _z_image, ("x",), "x", text_first=False)
HIDREAM = BlockClass(("block.attn1", "block.ff_i"), _sequential("block.adaLN_modulation", 6, (2, 5)), text_first=False)
DIT = BlockClass(("attn1", "ff"), _dit)
PIXART = _adaln_single("timestep", ("attn1", "attn2", "ff"))

CLASSES: dict[str, BlockClass | Callable[[Any], BlockClass | None]] = {
    "BasicTransformerBlock": lambda block: {"ada_norm_zero": DIT, "ada_norm_single": PIXART}.get(block.norm_type),
    "FluxTransformerBlock": DOUBLE,
    "FluxSingleTransformerBlock": SINGLE,
    "Flux2TransformerBlock": _flux2("temb_mod_img", 6, ("attn", "ff"), TEXT_IMAGE),
    "Flux2SingleTransformerBlock": _flux2("temb_mod", 3, ("attn",), ("hidden_states",)),
    "HunyuanVideoTransformerBlock": HUNYUAN_DOUBLE,
    "HunyuanVideoSingleTransformerBlock": HUNYUAN_SINGLE,
    "HunyuanVideo15TransformerBlock": HUNYUAN_DOUBLE,
    "HunyuanImageTransformerBlock": HUNYUAN_DOUBLE,
    "HunyuanImageSingleTransformerBlock": HUNYUAN_SINGLE,
    "JointTransformerBlock": BlockClass(("attn", "ff", "attn2"), _sd3, TEXT_IMAGE),
    "SD3SingleTransformerBlock": replace(DOUBLE, returns=("hidden_states",)),
    "QwenImageTransformerBlock": BlockClass(("attn", "img_mlp"), _qwen, TEXT_IMAGE),
    "CogVideoXBlock": BlockClass(
        ("attn1", "ff"), _each(_modulation("norm1", 6, (2,)), _modulation("norm2", 6, (2,))), IMAGE_TEXT
    ),
    "CogView3PlusTransformerBlock": BlockClass(
        ("attn1", "ff"), _modulation("norm1", 12, (2, 5), argument="emb"), IMAGE_TEXT
    ),
    "CogView4TransformerBlock": COGVIEW,
    "GlmImageTransformerBlock": COGVIEW,
    "EasyAnimateTransformerBlock": BlockClass(
        ("attn1", "ff"), _each(_modulation("norm1", 6, (2,)), _modulation("norm2", 6, (2,))), IMAGE_TEXT
    ),
    "AuraFlowJointTransformerBlock": replace(DOUBLE, modules=("ff",), gates=_modulation("norm1", 6, (5,))),
    "AuraFlowSingleTransformerBlock": replace(JOINT, modules=("ff",), gates=_modulation("norm1", 6, (5,))),
    "MotifVideoTransformerBlock": HUNYUAN_DOUBLE,
    "MotifVideoSingleTransformerBlock": HUNYUAN_SINGLE,
    "BriaTransformerBlock": DOUBLE,
    "BriaSingleTransformerBlock": SINGLE,
    "BriaFiboTransformerBlock": DOUBLE,
    "BriaFiboSingleTransformerBlock": JOINT,
    "LongCatImageTransformerBlock": DOUBLE,
    "LongCatImageSingleTransformerBlock": SINGLE,
    "OvisImageTransformerBlock": DOUBLE,
    "OvisImageSingleTransformerBlock": SINGLE,
    "ChromaTransformerBlock": replace(DOUBLE, gates=_chroma((2, 5))),
    "ChromaSingleTransformerBlock": replace(JOINT, gates=_chroma((2,))),
    "NucleusMoEImageTransformerBlock": BlockClass(("attn", "img_mlp"), _nucleus),
    "LuminaNextDiTBlock": LUMINA,
    "Lumina2TransformerBlock": lambda block: LUMINA if block.modulation else TEXT,
    "ZImageTransformerBlock": lambda block: Z_IMAGE if block.modulation else TEXT,
    "HiDreamBlock": _hidream,
    "JoyImageTransformerBlock": replace(
        _adaln_single("temb", ("attn", "img_mlp"), "img_mod.modulate_table"), returns=IMAGE_TEXT
    ),
    "SanaTransformerBlock": replace(_adaln_single("timestep", ("attn1", "attn2", "ff")), channels_first=True),
    "SanaVideoTransformerBlock": _adaln_single("timestep", ("attn1", "attn2", "ff")),
    "WanTransformerBlock": VIDEO,
    "SkyReelsV2TransformerBlock": VIDEO,
    "LTXVideoTransformerBlock": _adaln_single("temb", ("attn1", "attn2", "ff")),
    "AllegroTransformerBlock": _adaln_single("temb", ("attn1", "attn2", "ff")),
    "AceStepTransformerBlock": _adaln_single("temb", ("self_attn", "cross_attn", "mlp")),
    "Krea2TransformerBlock": _adaln_single("temb", ("attn", "ff")),
}


# Of the public repositories, DiT, SiT, REPA and HASTE, whose blocks have different names: by what they are called with,
# the modules, then the layer of the gates. MM-DiT attends over both streams; the image's own of that is its projection.
PUBLIC = {
    ("x", "c"): ("attn", "mlp", "adaLN_modulation"),
    STREAMS: ("x_block.attn.proj", "x_block.mlp", "x_block.adaLN_modulation"),
}


def block_class(block: nn.Module) -> BlockClass | None:
    """What is cached of a block; None if the table lacks its class."""
    for cls in type(block).__mro__:
        found = CLASSES.get(cls.__name__)
        if found is not None:
            return found if isinstance(found, BlockClass) else found(block)
    for names, (*modules, layer) in PUBLIC.items():
        if _names(block.__class__)[: len(names)] == names and all(_has(block, path) for path in (*modules, layer)):
            return BlockClass(tuple(modules), _sequential(layer, 6, (2, 5), "c"), names[:-1], "x")
    return None


def _has(block: nn.Module, path: str) -> bool:
    try:
        return attrgetter(path)(block) is not None
    except AttributeError:
        return False
