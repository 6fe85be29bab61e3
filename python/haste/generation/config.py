"""What decides sampled images: settings that `haste sample`, `haste evaluate` and the sweep share."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from haste.caching.config import CacheConfig, fast_config
from haste.errors import UserError, in_one_line, shorten
from haste.io import read_bytes
from haste.validation import DEFAULT_STEPS, check_number

logger = logging.getLogger(__name__)

LARGEST_FILE = 2**28  # bytes of a file of labels: a class for each of some 50 million images

if TYPE_CHECKING:  # flags are checked without torch
    from haste.generation.pipeline import LoadedCheckpoint

# What a bare file of weights does not tell.
ASSUMED = ("num_classes", "encoder_depth", "path_type")


@dataclass(kw_only=True)
class PublishedFlags:
    """Not needed; accepted so that published commands run, and refused where the checkpoint is another."""

    model: str | None = None
    """The model's size and patch, such as SiT-XL/2."""
    num_classes: int | None = None
    """Classes that the model knows."""
    encoder_depth: int | None = None
    """The block, counted from 1, whose tokens were compared with the teacher's."""
    resolution: int | None = None
    """Pixels per side of the images."""
    qk_norm: bool = False
    """The model normalises queries and keys."""
    projector_embed_dims: str | None = None
    """Widths of the teachers, with commas between them."""
    path_type: Literal["linear", "cosine"] | None = None
    """How data turned into noise. A bare file of weights does not tell; then the default is linear."""
    legacy: bool = False
    """Has no effect: checkpoints with REPA's older names are known by those names."""

    def assumed(self) -> dict[str, Any]:
        """The settings to go by where a checkpoint has none."""
        return {name: getattr(self, name) for name in ASSUMED if getattr(self, name) is not None}

    def refuse_other(self, loaded: LoadedCheckpoint, factor: int) -> None:
        """UserError, naming the flag, if one says what the checkpoint is not. What it does not tell is not compared.

        factor: pixels per value of what the model samples.
        """
        settings, layout = loaded.recorded.get("args", {}), loaded.layout
        dims = ",".join(map(str, loaded.recorded.get("z_dims", ()))) or None
        found = {
            "model": loaded.family.size_name(loaded.model_config),
            "num_classes": layout.num_classes,
            "encoder_depth": settings.get("encoder_depth"),
            "resolution": layout.input_shape[1] * factor,
            "projector_embed_dims": dims,
            "path_type": settings.get("path_type"),
        }
        for name, value in found.items():
            given = getattr(self, name)
            given = given.replace(" ", "") if name == "projector_embed_dims" and given else given
            if None not in (given, value) and given != value:
                raise UserError(f"--{name.replace('_', '-')} must be {value}, as the checkpoint has it, got {given}")
        if self.qk_norm and not loaded.model_config.get("qk_norm"):
            raise UserError("--qk-norm must be left out, as the checkpoint's attention has no such norm, got --qk-norm")


Settings = TypeVar("Settings", bound="SamplingConfig")


@dataclass(kw_only=True)
class SamplingConfig(CacheConfig):
    """How images are sampled. The names are those of SiT's and REPA's generate.py."""

    num_steps: int = DEFAULT_STEPS
    """Steps from noise to image."""
    mode: Literal["ode", "sde"] = "ode"
    """ode: the same noise gives the same image, Euler steps. sde: fresh noise at every step, Euler-Maruyama."""
    heun: bool = False
    """Heun's second-order steps for the ODE: twice the work of Euler's, fewer steps needed."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_low: float = 0.0
    """Guide only from this time on, 0 being the image ..."""
    guidance_high: float = 1.0
    """... up to this time, 1 being noise."""
    guidance_mode: Literal["batched", "separate"] = "batched"
    """Guided steps as one batch of twice the size, or in two halves that take half of the memory."""
    global_seed: int = 0
    """Same seed, same images, whatever the batch size."""
    labels: str = "random"
    """What to sample: random, balanced (0, 1, 2, ... in turn), or classes to take in turn: such as 3,1,4, or a text
    file with one on each line."""
    ema: bool = True
    """Sample with the averaged weights; --no-ema samples with the trained ones."""
    vae: str | None = None
    """ema, mse, a hub name or a folder: what turns latents into images. None: ema for Stable Diffusion's latents, as
    generate.py has it, unless the run was given another; for others what has made them."""
    convention: Literal["repa", "sit"] | None = None
    """Whose the checkpoint is, where it does not tell: repa (also HASTE's) or sit (SiT's own trainer)."""

    @property
    def sampler(self) -> str:
        """The sampler's name in `haste.samplers`."""
        return "euler-maruyama" if self.mode == "sde" else "heun" if self.heun else "euler"

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """Lowest and highest time of a guided step; None if all are."""
        interval = (self.guidance_low, self.guidance_high)
        return None if interval == (0.0, 1.0) else interval

    def describe(self) -> str:
        """'50 Euler steps, guidance 1.5, Taylor per module, interval 4, order 4', for titles."""
        parts = [f"{self.num_steps} {self.sampler.title()} steps"]
        if self.cfg_scale > 1:
            within = "" if self.guidance_interval is None else " from {:g} to {:g}".format(*self.guidance_interval)
            parts.append(f"guidance {self.cfg_scale:g}{within}")
        if self.cache != "none":
            parts.append(self.describe_cache())
        return ", ".join(parts)

    def short_name(self) -> str:
        """'euler-50-cfg1.5-seed0-taylor-module-i4-o4', for folders: the settings that people vary."""
        parts = [self.sampler, str(self.num_steps), f"cfg{self.cfg_scale:g}"]
        if self.guidance_interval is not None:
            parts.append("from{:g}-to{:g}".format(*self.guidance_interval))
        parts.append(f"seed{self.global_seed}")
        if self.labels != "random":
            parts.append("balanced" if self.labels == "balanced" else "listed")
        fields = self.cache_fields()
        if self.cache != "none":
            parts += [str(fields[name]) for name in ("cache", "granularity") if name in fields]
            parts += [f"f{len(self.full_step_list)}"] if self.full_steps else []
            letters = {"error_threshold": "e", "interval": "i", "order": "o", "gate": "g", "cached_blocks": "n"}
            parts += [f"{letter}{fields[name]:g}" for name, letter in letters.items() if fields.get(name) is not None]
        return "-".join(parts)

    def sampling_fields(self) -> dict:
        """Exactly the settings that decide the images, with the same names and types in every subclass."""
        own = set(SamplingConfig.__dataclass_fields__) - set(CacheConfig.__dataclass_fields__)
        fields = {name: value for name, value in asdict(self).items() if name in own}
        del fields["guidance_mode"]  # decides where they are rounded, not what they are
        del fields["convention"]  # which the checkpoint has settled
        if self.vae is None:
            del fields["vae"]  # whose name is a checkpoint's own
        return {**fields, **self.cache_fields()}

    def effective(self: Settings) -> Settings:
        """The same without what changes nothing, which published commands have: each is named by a line in the log.

        Raises UserError for a bound of guidance that is no time, also where there is no guidance.
        """
        idle: dict[str, Any] = {}
        if self.heun and self.mode == "sde":
            idle["heun"] = False
            logger.warning("--heun has no effect with --mode sde: it is a step of the ODE")
        for name, default in (("guidance_low", 0.0), ("guidance_high", 1.0)):
            check_number(name, getattr(self, name))
            if self.cfg_scale == 1 and getattr(self, name) != default:
                idle[name] = default
                logger.warning("--%s has no effect, as --cfg-scale is 1, which is no guidance", name.replace("_", "-"))
        return replace(self, **idle)

    def check(self) -> None:
        """UserError for values out of bounds, and for settings that contradict each other."""
        if self.heun and self.mode == "sde":
            raise UserError("--heun is a step of the ODE; it cannot be used with --mode sde")
        self.check_cache()
        self._check_guidance()

    def _check_guidance(self) -> None:
        if not self.guidance_low <= self.guidance_high:
            raise UserError(
                f"--guidance-low is {self.guidance_low:g}; it must not be above --guidance-high, {self.guidance_high:g}"
            )
        for name, default in (("guidance_low", 0.0), ("guidance_high", 1.0)):
            value = getattr(self, name)
            if self.cfg_scale == 1 and value != default:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {value:g}, and there is no guidance; it needs --cfg-scale above 1")


@dataclass(kw_only=True)
class SampleConfig(SamplingConfig, PublishedFlags):
    """The settings of `haste sample`, which are its flags."""

    ckpt: Path
    """A checkpoint file, or the folder of a run: then its newest whole checkpoint."""
    fast: bool = False
    """The recommended cache, in place of --cache and what goes with it. Made for the ODE."""
    num_fid_samples: int = 100
    """How many images to sample. (50,000 for a published FID.)"""
    per_proc_batch_size: int = 128
    """Images per batch of each process. Changes the speed and the memory, not the images."""
    sample_dir: Path | None = None
    """Where the folder of images goes; by default samples/ in the run's folder."""
    fused_attn: bool = True
    """Fused attention; --no-fused-attn computes it step by step."""
    tf32: bool = True
    """Let NVIDIA GPUs round fp32 matrix products to TF32."""
    compile: bool = False
    """Let torch.compile fuse the model. The first batch takes a minute or so longer."""
    cuda_graphs: bool = False
    """On a GPU and with a cache: replay full and forecast calls as CUDA graphs. Not yet tried on a GPU."""

    def resolved(self) -> SampleConfig:
        """The same, with --fast and a file of labels replaced by what they stand for, without what has no effect."""
        chosen: dict[str, Any] = {}
        if self.fast:
            for name, default in asdict(CacheConfig()).items():
                value = getattr(self, name)
                if value != default:
                    flag = name.replace("_", "-")
                    raise UserError(f"--{flag} is {value} beside --fast, which chooses it; give one or the other")
            chosen = asdict(fast_config(self.num_steps, noisy=self.mode == "sde"))
        return replace(self, fast=False, labels=list_labels(self.labels), **chosen).effective()


def list_labels(policy: str) -> str:
    """The policy itself; in place of a file's name, the classes that stand on its lines, as 3,1,4."""
    path = _as_file(policy)
    if path is None:
        return policy
    try:
        lines = read_bytes(path, LARGEST_FILE).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels is {policy}, which cannot be read as text: {in_one_line(error)}") from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in filled:
        if not (line.isascii() and line.isdecimal()):
            raise UserError(f"--labels is {policy}, whose line {number} is {shorten(line)}; it must be a class as 3")
    if not filled:
        raise UserError(f"--labels is {policy}, which is empty; it must have one class on each line")
    return ",".join(line for _, line in filled)


def _as_file(policy: str) -> Path | None:
    """The file that a policy names; None if it names none."""
    try:
        path = Path(policy).expanduser()
        return path if len(policy) <= 4096 and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, NUL in it, ~ of an unknown user
        return None
