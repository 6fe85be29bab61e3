"""What decides the pictures of a command: the flags that `haste sample`, `haste evaluate` and the sweep share."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from haste.bounds import DEFAULT_STEPS, check_number
from haste.caching.settings import CacheSettings
from haste.errors import UserError

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound="SamplingSettings")


@dataclass(kw_only=True)
class SamplingSettings(CacheSettings):
    """How pictures are drawn. The names are those of SiT's and REPA's generate.py."""

    num_steps: int = DEFAULT_STEPS
    """Steps from noise to picture."""
    mode: Literal["ode", "sde"] = "ode"
    """ode: the same noise gives the same picture, Euler steps. sde: fresh noise at every step, Euler-Maruyama."""
    heun: bool = False
    """Heun's second-order steps for the ODE: twice the work of Euler's, fewer steps needed."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""
    guidance_low: float = 0.0
    """Guide only from this time on, 0 being the picture ..."""
    guidance_high: float = 1.0
    """... up to this time, 1 being noise."""
    guidance_mode: Literal["batched", "separate"] = "batched"
    """Guided steps as one batch of twice the size, or in two halves that take half of the memory."""
    global_seed: int = 0
    """Same seed, same pictures, whatever the batch size."""
    labels: str = "random"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn: such as 3,1,4, or a text file
    with one on each line."""
    ema: bool = True
    """Draw with the averaged weights; --no-ema draws with the trained ones."""
    vae: str | None = None
    """ema, mse, a hub name or a folder: what turns latents into pictures. None: ema for Stable Diffusion's latents, as
    generate.py has it, unless the run was given another; for others what has made them."""
    convention: Literal["repa", "sit"] | None = None
    """Whose the checkpoint is, where it does not tell: repa (also HASTE's) or sit (SiT's own trainer)."""

    @property
    def sampler(self) -> str:
        """The sampler's name in `haste.sampling`."""
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
            letters = {"max_error": "e", "interval": "i", "order": "o", "gate": "g", "cached_blocks": "n"}
            parts += [f"{letter}{fields[name]:g}" for name, letter in letters.items() if fields.get(name) is not None]
        return "-".join(parts)

    def sampling_fields(self) -> dict:
        """Exactly the settings that decide the pictures, with the same names and types in every subclass."""
        own = set(SamplingSettings.__dataclass_fields__) - set(CacheSettings.__dataclass_fields__)
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
