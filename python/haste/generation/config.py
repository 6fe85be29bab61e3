"""The settings of sampling, shared by `haste sample`, `haste evaluate` and `haste sweep`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from haste.caching.config import CacheConfig, fast_config
from haste.errors import UserError, in_one_line, shorten
from haste.generation.prompts import describe_prompts, existing_path, list_prompts, name_prompts
from haste.io import read_bytes
from haste.validation import DEFAULT_STEPS, check_number

logger = logging.getLogger(__name__)

OF_GUIDANCE = {"guidance_low": 0.0, "guidance_high": 1.0, "cls_cfg_scale": None}  # settings without effect without it
LONGEST_LIST = 20  # characters of a list in the name of a folder
LARGEST_FILE = 2**28  # bytes of a file of labels: a class for each of some 50 million images

if TYPE_CHECKING:  # flags are checked without torch
    from haste.generation.loaded import LoadedCheckpoint


@dataclass(kw_only=True)
class PublishedFlags:
    """Flags of published commands. Not needed; those of the model are an error if they do not match the checkpoint."""

    model: str | None = None
    """Model size and patch size, such as SiT-XL/2."""
    num_classes: int | None = None
    """Number of classes."""
    encoder_depth: int | None = None
    """Block aligned with the teacher's features, counted from 1."""
    resolution: int | None = None
    """Image resolution in pixels."""
    qk_norm: bool = False
    """Model with query-key normalisation."""
    projector_embed_dims: str | None = None
    """Comma-separated feature dimensions of the teachers."""
    path_type: Literal["linear", "cosine"] | None = None
    """Interpolation path of training. [default: as in the checkpoint; linear for bare weights]"""
    legacy: bool = False
    """No effect; checkpoints with REPA's older names are recognised."""
    cls: int | None = None
    """Width of the class token of a model that has one (REG)."""
    prefix: str = ""
    """Beginning of the name of the output folder."""

    def assumed(self) -> dict[str, Any]:
        """The settings for a checkpoint without settings."""
        given = {"num_classes": self.num_classes, "encoder_depth": self.encoder_depth, "path_type": self.path_type}
        return {name: value for name, value in given.items() if value is not None}

    def refuse_other(self, loaded: LoadedCheckpoint, factor: int) -> None:
        """UserError, naming the flag, if one does not match the checkpoint; `factor` is pixels per latent, or 1."""
        settings, layout = loaded.recorded.get("args", {}), loaded.layout
        dims = ",".join(map(str, loaded.recorded.get("z_dims", ()))) or None
        found = {
            "model": loaded.family.size_name(loaded.model_config),
            "num_classes": layout.num_classes,
            "encoder_depth": settings.get("encoder_depth"),
            "resolution": layout.input_shape[1] * factor,
            "projector_embed_dims": dims,
            "cls": layout.class_token,
            "path_type": settings.get("path_type"),
        }
        for name, value in found.items():
            given = getattr(self, name)
            given = given.replace(" ", "") if name == "projector_embed_dims" and given else given
            if None not in (given, value) and given != value:
                raise UserError(f"--{name.replace('_', '-')} must be {value}, as in the checkpoint, got {given}")
        if self.qk_norm and not loaded.model_config.get("qk_norm"):
            raise UserError("--qk-norm must be left out, as the checkpoint has no query-key normalisation")


Settings = TypeVar("Settings", bound="SamplingConfig")


@dataclass(kw_only=True)
class SamplingConfig(CacheConfig):
    """Sampling settings, named as in SiT's and REPA's generate.py."""

    num_steps: int = DEFAULT_STEPS
    """Number of sampling steps; of each part where images are made in parts."""
    cell_steps: str = ""
    """Where images are made in parts, such as xAR's cells: the number of steps of each, such as 50,38,26,15, in place
    of --num-steps."""
    stagger: int | None = None
    """Where images are made in parts: each starts this many steps behind the one before it, and all parts under way
    are one model call; 0 is all at once. [default: a part starts when the one before it is done]"""
    mode: Literal["ode", "sde", "ddim", "ddpm"] | None = None
    """Sampler. Of a model that predicts a velocity: ode (Euler, deterministic) or sde (Euler-Maruyama, fresh noise at
    each step). Of one that predicts noise, such as DiT: ddim (deterministic) or ddpm. [default: ode or ddim]"""
    heun: bool = False
    """Use Heun's second-order ODE sampler; two model calls per step."""
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None
    """Times of ddim and ddpm, by diffusers' names: linspace (evenly from 999 to 0, as DiT), leading (multiples of
    1000 / --num-steps from 0) or trailing (the same, counted down from 999). [default: linspace]"""
    time_shift: float | None = None
    """Of a model of velocity: factor of the noise level of each step; above 1 there are more steps near noise.
    [default: that of training; 1 if the checkpoint does not record it]"""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 disables guidance."""
    guidance_low: float = 0.0
    """Lower end of the guidance interval; time 0 is the image."""
    guidance_high: float = 1.0
    """Upper end of the guidance interval; time 1 is pure noise."""
    guided_channels: int | None = None
    """How many of the model's channels guidance changes, from the first. [default: all; the first 3 of the latents of
    DiT and of SiT's own trainer, as they do]"""
    cls_cfg_scale: float | None = None
    """Of a model with a class token (REG): its guidance scale, in the steps of the guidance interval; 0, as in REG, or
    1 leaves it unguided. [default: --cfg-scale]"""
    guidance_mode: Literal["batched", "separate"] = "batched"
    """Run cond and uncond as one batch, or as two with half the memory."""
    global_seed: int = 0
    """Random seed. Images do not depend on the batch size."""
    labels: str = "random"
    """Class labels: random, balanced (0, 1, 2, ... in turn), none for images of no class, or a list to cycle through,
    such as 3,1,4 or a text file with one class per line."""
    prompts: str = ""
    """For a model of text: a prompt, a UTF-8 file with one on each line, or a folder of captioned data, of which image
    i gets one caption of image i. Images cycle through them. [default: captions of the training data]"""
    text_encoder: str | None = None
    """Text encoder of the prompts: a folder or a hub name. [default: the one of training; CLIP-L for checkpoints of
    REPA and HASTE]"""
    ema: bool = True
    """Use the EMA weights."""
    ema_decay: float | None = None
    """Decay of the EMA to use, of a run with --extra-ema-decays. [default: the run's --ema-decay]"""
    vae: str | None = None
    """VAE that decodes latents: ema, mse, a hub name, a folder, or a file such as MAR's kl16.ckpt or VA-VAE's.
    [default: the one of training; ema for Stable Diffusion's latents, as in generate.py]"""
    vae_stats: str | None = None
    """File with the mean and standard deviation of each latent channel, as of `haste train`, for another trainer's
    checkpoint: haste's record them."""
    convention: Literal["repa", "sit", "dit"] | None = None
    """Trainer of a checkpoint that does not record it: repa (also HASTE), sit (SiT's own, LightningDiT's) or dit
    (DiT's)."""

    @property
    def sampler(self) -> str:
        """The name of the sampler in `haste.samplers`."""
        if self.mode in ("ddim", "ddpm"):
            return self.mode
        return "euler-maruyama" if self.mode == "sde" else "heun" if self.heun else "euler"

    @property
    def weights(self) -> bool | float:
        """Which weights to load: the argument `ema` of `load_checkpoint`."""
        return self.ema if self.ema_decay is None else self.ema_decay

    @property
    def noisy(self) -> bool:
        """Whether each step adds noise."""
        return self.mode in ("sde", "ddpm")

    @property
    def cell_step_list(self) -> list[int]:
        """--cell-steps as numbers; empty if it is not given."""
        if not self.cell_steps:
            return []
        if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", self.cell_steps):
            raise UserError(f"--cell-steps must be numbers such as 50,38,26,15, got {shorten(repr(self.cell_steps))}")
        return [int(word) for word in self.cell_steps.split(",")]

    @property
    def shortest(self) -> int:
        """The smallest number of steps of a part; --num-steps without --cell-steps."""
        return min(self.cell_step_list or [self.num_steps])

    @property
    def longest(self) -> int:
        """The largest one."""
        return max(self.cell_step_list or [self.num_steps])

    # Defaults of the cache shrink to what fits into a short run.

    @property
    def resolved_interval(self) -> int:
        known = super().resolved_interval
        return known if self.interval is not None or self.error_threshold else min(known, self.shortest)

    @property
    def resolved_first_enhance(self) -> int:
        known = super().resolved_first_enhance
        return known if self.first_enhance is not None else min(known, self.shortest)

    @property
    def resolved_order(self) -> int:
        known, full = super().resolved_order, self.planned_full_steps(self.longest)
        return known if self.order is not None or full is None else min(known, max(0, len(full) - 1))

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """Lowest and highest time of guided steps; None if all are guided."""
        interval = (self.guidance_low, self.guidance_high)
        return None if interval == (0.0, 1.0) else interval

    def describe(self) -> str:
        """'50 Euler steps, guidance 1.5, Taylor per module, interval 4, order 4', for titles."""
        name = self.sampler.upper() if self.sampler in ("ddim", "ddpm") else self.sampler.title()
        parts = [f"{self.cell_steps or self.num_steps} {name} steps"]
        parts += [] if self.timestep_spacing in (None, "linspace") else [f"{self.timestep_spacing} times"]
        parts += [] if self.time_shift in (None, 1) else [f"time shift {self.time_shift:g}"]
        parts += [] if self.stagger is None else [f"stagger {self.stagger}"]
        if self.cfg_scale > 1:
            within = "" if self.guidance_interval is None else " from {:g} to {:g}".format(*self.guidance_interval)
            within += "" if self.guided_channels is None else f" of {self.guided_channels} channels"
            within += "" if self.cls_cfg_scale is None else f", {self.cls_cfg_scale:g} of the class token"
            parts.append(f"guidance {self.cfg_scale:g}{within}")
        if self.cache != "none":
            parts.append(self.describe_cache())
        return ", ".join(parts)

    def short_name(self) -> str:
        """'euler-50-cfg1.5-seed0-taylor-module-i4-o4', for folders: the settings that users vary most."""
        parts = [self.sampler, _list_name(self.cell_step_list or [self.num_steps])]
        parts += [] if self.timestep_spacing in (None, "linspace") else [self.timestep_spacing]
        parts += [] if self.time_shift in (None, 1) else [f"shift{self.time_shift:g}"]
        parts += [] if self.stagger is None else [f"stagger{self.stagger}"]
        parts += [f"cfg{self.cfg_scale:g}"]
        if self.guidance_interval is not None:
            parts.append("from{:g}-to{:g}".format(*self.guidance_interval))
        parts += [] if self.guided_channels is None else [f"guided{self.guided_channels}"]
        parts += [] if self.ema_decay is None else [f"ema{self.ema_decay!r}"]
        parts += [] if self.cls_cfg_scale is None else [f"cls{self.cls_cfg_scale:g}"]
        parts.append(f"seed{self.global_seed}")
        if self.labels != "random":
            parts.append("balanced" if self.labels == "balanced" else f"labels{_list_name(self.labels.split(','))}")
        if self.prompts:
            parts.append(name_prompts(self.prompts))
        fields = self.cache_fields()
        if self.cache != "none":
            parts += [str(fields[name]) for name in ("cache", "granularity") if name in fields]
            parts += [f"full{_list_name(self.full_step_list)}"] if self.full_steps else []
            letters = {"error_threshold": "e", "interval": "i", "order": "o", "gate": "g", "cached_blocks": "n"}
            parts += [f"{letter}{fields[name]:g}" for name, letter in letters.items() if fields.get(name) is not None]
            parts += [fields["spacing"]] if "spacing" in fields else []
        return "-".join(parts)

    def sampling_fields(self) -> dict:
        """The settings that decide the images, with the same names and types in every subclass."""
        own = set(SamplingConfig.__dataclass_fields__) - set(CacheConfig.__dataclass_fields__)
        fields = {name: value for name, value in asdict(self).items() if name in own}
        del fields["guidance_mode"]  # affects rounding only
        del fields["convention"]  # recorded with the checkpoint
        for name in ("vae", "vae_stats", "text_encoder"):
            if fields[name] is None:
                del fields[name]  # the checkpoint's own
        prompts = fields.pop("prompts")
        if prompts:
            fields["prompts"] = describe_prompts(prompts)
        for name in ("cell_steps", "stagger", "timestep_spacing", "guided_channels", "ema_decay", "cls_cfg_scale"):
            if fields[name] in ("", None):
                del fields[name]
        if fields["time_shift"] in (None, 1):  # as in records of versions without it
            del fields["time_shift"]
        return {**fields, **self.cache_fields()}

    def effective(self: Settings) -> Settings:
        """The settings without those of published commands that have no effect, with a warning. Raises UserError."""
        idle: dict[str, Any] = {}
        for name, default in {**OF_GUIDANCE, "guided_channels": None}.items():
            if getattr(self, name) != default:
                check_number(name, getattr(self, name))
            if self.cfg_scale == 1 and getattr(self, name) != default:
                idle[name] = default
                logger.warning("--%s has no effect with --cfg-scale 1, without guidance", name.replace("_", "-"))
        if self.cell_steps and self.num_steps != DEFAULT_STEPS:
            idle["num_steps"] = DEFAULT_STEPS
            logger.warning("--num-steps has no effect with --cell-steps %s", self.cell_steps)
        return replace(self, **idle)

    def check(self) -> None:
        """Raise UserError for values out of bounds and settings that contradict each other."""
        if self.heun and self.mode not in (None, "ode"):
            raise UserError(f"--heun must come with --mode ode, got --mode {self.mode}")
        if self.ema_decay is not None and not self.ema:
            raise UserError(f"--ema-decay must be left out with --no-ema, got {self.ema_decay!r}")
        self._check_parts()
        self.check_cache()
        if not self.guidance_low <= self.guidance_high:
            raise UserError(
                f"--guidance-low must be at most --guidance-high, {self.guidance_high:g}, got {self.guidance_low:g}"
            )
        if self.labels == "none" and self.cfg_scale > 1:
            raise UserError(f"--cfg-scale must be 1 with --labels none, got {self.cfg_scale:g}")
        for name, default in OF_GUIDANCE.items():
            value = getattr(self, name)
            if self.cfg_scale == 1 and value != default:
                raise UserError(f"--{name.replace('_', '-')} must come with --cfg-scale above 1, got {value:g} without")

    def _check_parts(self) -> None:
        for count in self.cell_step_list:
            check_number("num_steps", count, shown="--cell-steps")
        if self.stagger is None:
            return
        check_number("stagger", self.stagger)
        if self.heun:
            raise UserError(f"--stagger must be left out with --heun, got {self.stagger}")
        if self.stagger > self.longest:
            raise UserError(f"--stagger must be at most the number of steps, {self.longest}, got {self.stagger}")


@dataclass(kw_only=True)
class SampleConfig(SamplingConfig, PublishedFlags):
    """The settings of `haste sample`, which are its flags."""

    ckpt: Path
    """Checkpoint file, or run folder for its latest checkpoint."""
    fast: bool = False
    """Use the recommended cache settings, tuned for the ODE, instead of --cache and its options."""
    num_fid_samples: int = 100
    """Number of images to sample; 50,000 for a published FID."""
    per_proc_batch_size: int = 128
    """Batch size per process. Does not change the images."""
    sample_dir: Path | None = None
    """Output folder. [default: samples/ in the run folder]"""
    fused_attn: bool = True
    """Use fused attention."""
    tf32: bool = True
    """Allow TF32 matrix products on NVIDIA GPUs."""
    compile: bool = False
    """Compile the model with torch.compile; the first batch takes about a minute longer."""
    cuda_graphs: bool = False
    """Replay the calls of a model that is cached, or makes images in parts, as CUDA graphs. Not yet tried on a GPU."""

    def resolved(self) -> SampleConfig:
        """The same settings with --fast and files of labels and prompts expanded, and without those of no effect.

        `fast` stays, for the granularity depends on the model (`fit_to_family`); resolved settings stay as they are.
        """
        flag = "cell-steps" if self.cell_steps else "num-steps"
        chosen = asdict(fast_config(self.shortest, self.noisy, flag)) if self.fast else {}
        given = {name: getattr(self, name) for name in chosen}
        if given != chosen:
            for name, default in asdict(CacheConfig()).items():
                if self.fast and given[name] != default:
                    flag = name.replace("_", "-")
                    raise UserError(f"--{flag} must be left out with --fast, which sets it, got {given[name]}")
        known = replace(self, labels=list_labels(self.labels), prompts=list_prompts(self.prompts))
        return replace(known, **chosen).effective()


def _list_name(values: Sequence[object]) -> str:
    """'3_1_4' for the name of a folder; of a longer list the length and a digest."""
    name = "_".join(str(value).strip() for value in values)
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST_LIST else f"{len(values)}_{digest}"


def list_labels(policy: str) -> str:
    """A --labels policy with a file's name replaced by the classes on its lines, as 3,1,4."""
    path = existing_path(policy)
    if path is None or not path.is_file():
        return policy
    try:
        lines = read_bytes(path, LARGEST_FILE).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels must be a text file, got {policy}: {in_one_line(error)}") from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in filled:
        if not (line.isascii() and line.isdecimal()):
            found = f"{shorten(line)} on line {number} of {policy}"
            raise UserError(f"--labels must have a class on each line, got {found}")
    if not filled:
        raise UserError(f"--labels must have a class on each line, got {policy}, which is empty")
    return ",".join(line for _, line in filled)
