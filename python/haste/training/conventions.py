"""Checkpoints of other trainers: whose conventions a file keeps, its weights under our names and in our conventions.

- repa: HASTE, REPA and this trainer. t = 0 is data, the velocity is ε − x.
- sit: SiT's own trainer. t = 1 is data, the velocity is x − ε. Its sampler guides three of four channels.

DiT predicts noise, with weights of the same names and shapes as SiT's. What was trained otherwise is refused by name.
Our files have the same keys in the same order as REPA's and HASTE's, so those trainers read them as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.models import get_family
from haste.models.layers import TimestepEmbedder
from haste.validation import shown

logger = logging.getLogger(__name__)

Convention = Literal["repa", "sit"]

# SiT's names of what is here called so.
SIT_PATHS = {"Linear": "linear", "GVP": "cosine"}
SIT_PREDICTIONS = ("velocity",)

# Settings that only the trainers of this family keep, and those that only SiT's keeps.
OF_REPA = ("enc_type", "proj_coeff", "attn_coeff", "encoder_depth", "projector_embed_dims")
OF_SIT = ("loss_weight", "train_eps", "sample_eps")


def find_convention(
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    args: Mapping[str, Any],
    file: Path,
    given: Convention | None = None,
) -> Convention:
    """By what the file tells, or where it does not by `given`, which is --convention.

    content: what the file holds; weights: those of it; args: the settings of its run.
    Raises UserError for a model that predicts something else than a velocity, for a file that does not tell where
    nothing is given, and where it tells something else than is given.
    """
    refuse_other_predictions(args, file)
    stated = _stated(content, weights, args, file)
    if stated is not None and given not in (None, stated):
        raise UserError(f"--convention must be {stated}, as {file} tells, got {given}")
    found = stated or given
    if found is None:
        raise UserError(
            f"--convention must be given for {file}, which does not tell who trained it: repa (HASTE, REPA: t = 0 is "
            "data) or sit (SiT's own trainer: t = 1 is data). Weights of DiT, which predict noise, cannot be used"
        )
    return found


def refuse_other_predictions(args: Mapping[str, Any], file: Path) -> None:
    """UserError, by name, for what is trained to predict no velocity, or on another path."""
    model, prediction, path = (_text(args, name) for name in ("model", "prediction", "path_type"))
    if model.startswith("DiT"):
        raise UserError(f"{file} holds a {model}, which predicts noise; it must be a SiT, which predicts a velocity")
    if prediction not in ("", "v", *SIT_PREDICTIONS):
        raise UserError(f"{file} was trained with --prediction {prediction}; it must be velocity")
    if path not in ("", *SIT_PATHS, *SIT_PATHS.values()):
        raise UserError(f"{file} was trained with --path-type {path}; it must be Linear (linear) or GVP (cosine)")


def _stated(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], args: Mapping[str, Any], file: Path
) -> Convention | None:
    if content.get("model_config") is not None or "steps" in content:  # SiT's trainer keeps no number of steps
        return "repa"
    if any(name in args for name in OF_SIT) or _text(args, "prediction") in SIT_PREDICTIONS:
        return "sit"
    if _text(args, "path_type") in SIT_PATHS:
        return "sit"
    if any(name in args for name in OF_REPA) or any(name.startswith("projectors.") for name in weights):
        return "repa"
    sigma = sigma_head(weights)
    if sigma is None:
        return None
    if file.name.startswith("DiT"):
        raise UserError(f"{file} holds a DiT, by its name, which predicts noise; it must be a SiT")
    # SiT's loss never reaches this half of the head, which begins as zeros; DiT's trains it.
    if not sigma.any():
        return "sit"
    if file.name.startswith("SiT"):
        logger.info("%s is taken for SiT's own, by its name", file)
        return "sit"
    return None


def sigma_head(weights: Mapping[str, Tensor]) -> Tensor | None:
    """The half of the output that learn_sigma adds, (patch², channels, width); None without it."""
    head, embed = weights.get("final_layer.linear.weight"), weights.get("x_embedder.proj.weight")
    if head is None or embed is None or head.dim() != 2 or embed.dim() != 4:
        return None
    _, channels, patch, _ = embed.shape
    if not channels * patch or len(head) != 2 * patch * patch * channels:
        return None
    return head.reshape(patch * patch, 2 * channels, -1)[:, channels:]


def our_settings(args: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
    """The settings of a run under our names. Of SiT's trainer those alone that mean here what they mean there."""
    if convention == "repa":
        return dict(args)
    same = {name: args[name] for name in ("model", "num_classes", "encoder_depth") if args.get(name) is not None}
    size = {"resolution": args["image_size"]} if args.get("image_size") is not None else {}
    path = _text(args, "path_type")
    return {**same, **size, "path_type": SIT_PATHS.get(path, path or "linear"), "prediction": "v"}


def _text(args: Mapping[str, Any], name: str) -> str:
    """A setting that is text, or nothing: another type is refused where all settings are."""
    value = args.get(name)
    return value if isinstance(value, str) else ""


def guided_channels(convention: Convention, channels: int) -> int | None:
    """How many channels, the first ones, the authors' sampler guides; None for all. SiT's is DiT's with its three."""
    return 3 if convention == "sit" and channels > 3 else None


Weights = dict[str, Tensor]

# What torch.compile, DDP, FSDP and activation checkpointing put into the names of what they wrap.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_parts(content: Mapping[str, Any], file: Path) -> dict[str, Weights]:
    """model and ema as a file has them, under our names.

    A bare file of weights, and one that holds only averaged ones, gives these for both.
    Raises UserError for a file that holds no weights.
    """
    held = {part: content[part] for part in ("model", "ema") if not is_empty(content.get(part))}
    parts = {part: dense_weights(values, f"{part} of {file}") for part, values in held.items()}
    if not parts:
        parts["model"] = dense_weights(content.get("state_dict", content), str(file))
    renamed = {part: rename_legacy(weights) for part, weights in parts.items()}
    return {part: renamed.get(part, next(iter(renamed.values()))) for part in ("model", "ema")}


def is_empty(value: Any) -> bool:
    """Whether a part of a file is not there, for all that it holds: None, or a dictionary of nothing."""
    return value is None or (isinstance(value, Mapping) and not value)


def dense_weights(values: Any, source: str) -> Weights:
    """The tensors of a state_dict under the names that they have in the model itself.

    source: names the file and the part of it.
    Raises UserError for anything else than dense tensors of floating-point numbers that are all in the file.
    """
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{source} must hold weights by their names, and is {shown(values)}")
    weights: Weights = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source} must hold weights by their names, and {name!r} is {shown(value)}")
        why = why_unusable(value)
        if why:
            raise UserError(f"{source} must hold dense floating-point weights, and {name} is {why}")
        name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if name in weights:
            raise UserError(f"{source} has {name} twice, once under a wrapper's name")
        weights[name] = value.detach()
    return weights


def why_unusable(value: Tensor) -> str:
    """What keeps a tensor of a file from being a weight; empty for a good one."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return "sparse, nested or quantised"
    if value.device.type != "cpu":
        return f"on {value.device}, without values"
    if value.dtype not in FLOATS:
        return str(value.dtype).removeprefix("torch.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)}, for which the file has too few values"
    return ""


def require_names(model: nn.Module, weights: Weights, source: str) -> None:
    """UserError, naming the first that does not belong and the first that is missing, unless these are its weights.

    Projectors are passed over. model: may be on the meta device, so that nothing is allocated for what does not fit.
    """
    expected = [name for name in model.state_dict() if not is_projector(name)]
    found = [name for name in weights if not is_projector(name)]
    foreign = next((name for name in found if name not in expected), None)
    missing = next((name for name in expected if name not in found), None)
    if foreign or missing:
        wrong = [f"{foreign} does not belong"] * bool(foreign) + [f"{missing} is missing"] * bool(missing)
        title = get_family(model).title
        raise UserError(f"{source} does not hold the weights of a {title} of its size: {' and '.join(wrong)}")


def require_shapes(model: nn.Module, weights: Weights, source: str) -> None:
    """UserError, naming the first that has not the shape that it has in the model. What is missing is passed over."""
    for name, value in model.state_dict().items():
        if name in weights and weights[name].shape != value.shape:
            has = tuple(weights[name].shape)
            raise UserError(f"{name} of {source} must have the shape {tuple(value.shape)}, and has {has}")


def first_not_finite(weights: Weights) -> str | None:
    """The name of the first weight that holds NaN or infinity."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def is_projector(name: str) -> bool:
    """Whether this is the name of a projector's weight."""
    return name.startswith("projectors.")


def rename_legacy(weights: Weights) -> Weights:
    """REPA's first checkpoints count the blocks after the projectors anew, as decoder_blocks."""
    old = "decoder_blocks."
    if not any(name.startswith(old) for name in weights):
        return weights
    before = _depth(weights, "blocks.")

    def rename(name: str) -> str:
        number, _, rest = name.removeprefix(old).partition(".")
        return f"blocks.{int(number) + before}.{rest}" if name.startswith(old) and number.isdecimal() else name

    return {rename(name): value for name, value in weights.items()}


def _depth(weights: Weights, prefix: str) -> int:
    """How many blocks there are; their numbers alone tell, as every one has weights."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    return len({number for number in numbers if number.isdecimal()})


def from_sit(weights: Weights) -> Weights:
    """SiT's own weights as a model of our conventions. What does not have their shape is left as it is.

    SiT's f(x, s) predicts x₀ − ε at time s = 1 − t. So v(x, t) = −f(x, 1 − t):
    the head changes its sign and loses the half that predicts sigma, and the time embedding takes in that
    cos((1−t)ω) = cos ω·cos tω + sin ω·sin tω  and  sin((1−t)ω) = sin ω·cos tω − cos ω·sin tω.
    """
    head, frequencies = "final_layer.linear", "t_embedder.mlp.0.weight"
    converted = dict(weights)
    both = sigma_head(weights) is not None
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in weights:
            value = weights[name]
            converted[name] = -(_velocity_half(value, weights["x_embedder.proj.weight"]) if both else value)
    if frequencies not in weights or weights[frequencies].dim() != 2 or weights[frequencies].shape[1] % 2:
        return converted
    of_cos, of_sin = weights[frequencies].double().chunk(2, dim=1)
    embedder = TimestepEmbedder(1, num_frequencies=weights[frequencies].shape[1])
    cos, sin = embedder.frequencies(torch.ones(1, dtype=torch.float64)).chunk(2, dim=1)
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    converted[frequencies] = turned.to(weights[frequencies].dtype)
    return converted


def _velocity_half(value: Tensor, embedder: Tensor) -> Tensor:
    """The rows of a head's weight or bias that predict no sigma; as it is if it has not the rows of both."""
    _, channels, patch, _ = embedder.shape
    area = patch * patch
    if not value.dim() or len(value) != 2 * area * channels:
        return value
    return value.reshape(area, 2 * channels, *value.shape[1:])[:, :channels].reshape(area * channels, *value.shape[1:])


# ---- the order of parameters, by which an optimizer's state counts them ----


def with_projectors(weights: Weights, projectors: Weights, order: Sequence[str]) -> Weights:
    """Weights of a model whose projectors were freed, with these where they were.

    order: names of a file that has both.
    """
    names = list(order)
    last = max((number for number, name in enumerate(names) if name in projectors), default=len(names))
    following = next((name for name in names[last:] if name in weights), None)
    merged: Weights = {}
    for name, value in weights.items():
        if name == following:
            merged.update(projectors)
        merged[name] = value
    return {**merged, **projectors}


def reorder_state(state: Mapping[int, Any], source: Sequence[str], target: Sequence[str]) -> dict[int, Any]:
    """AdamW's state per parameter, counted in the order of `source`, for an optimizer that has `target`."""
    place = {name: number for number, name in enumerate(source)}
    return {number: state[place[name]] for number, name in enumerate(target) if name in place and place[name] in state}
