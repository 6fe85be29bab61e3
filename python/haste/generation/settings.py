"""What decides the pictures of a command: the flags that `haste sample`, `haste evaluate` and the sweep share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from haste.caching.settings import CacheSettings
from haste.errors import UserError


@dataclass(kw_only=True)
class SamplingSettings(CacheSettings):
    """How pictures are drawn. The names are those of SiT's and REPA's generate.py."""

    num_steps: int = 50
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
    global_seed: int = 0
    """Same seed, same pictures, whatever the batch size."""
    labels: str = "random"
    """What to draw: random, balanced (0, 1, 2, ... in turn), or classes to take in turn, such as 3,1,4."""
    ema: bool = True
    """Draw with the averaged weights; --no-ema draws with the trained ones."""

    @property
    def sampler(self) -> str:
        """The sampler's name in `haste.sampling`."""
        return "euler-maruyama" if self.mode == "sde" else "heun" if self.heun else "euler"

    def describe(self) -> str:
        """'50 Euler steps, guidance 1.5, Taylor per module, interval 4, order 4', for titles."""
        parts = [f"{self.num_steps} {self.sampler.title()} steps"]
        if self.cfg_scale > 1:
            parts.append(f"guidance {self.cfg_scale:g}")
        if self.cache != "none":
            parts.append(self.describe_cache())
        return ", ".join(parts)

    def sampling_fields(self) -> dict:
        """Exactly the settings that decide the pictures, with the same names and types in every subclass."""
        own = set(SamplingSettings.__dataclass_fields__) - set(CacheSettings.__dataclass_fields__)
        return {**{name: value for name, value in asdict(self).items() if name in own}, **self.cache_fields()}

    def check(self) -> None:
        """UserError for settings that contradict each other; the sampler checks the values."""
        if self.heun and self.mode == "sde":
            raise UserError("--heun is a step of the ODE; it cannot be used with --mode sde")
        self.check_cache()
        if self.global_seed < 0:
            raise UserError(f"--global-seed is {self.global_seed}; it must be at least 0")
