"""Samplers from noise to data, with classifier-free guidance: of models that predict a velocity, from t = 1 to t = 0,
and of models that predict noise, from t = 999 to t = 0.

`methods` has one short function per sampler, a coroutine that asks for predictions; `guidance` what one is made of;
`run` drives a sampler on a model (`sample`), `parts` several of them on images that are made in parts.
"""

from haste.samplers.guidance import (
    BOTH,
    COND,
    MODES,
    UNCOND,
    Branches,
    Guidance,
    ModelCall,
    Velocity,
    model_calls,
    time_of,
    times_at,
)
from haste.samplers.methods import (
    SAMPLERS,
    Method,
    Request,
    choose_sampler,
    ddim,
    ddpm,
    euler,
    euler_maruyama,
    evaluations,
    heun,
    sde_drift,
    time_grid,
)
from haste.samplers.parts import Engine, PartCache, PartCall, Solver, evaluate, plan_parts
from haste.samplers.run import Generators, initial_noise, sample

__all__ = [
    "BOTH",
    "COND",
    "MODES",
    "SAMPLERS",
    "UNCOND",
    "Branches",
    "Engine",
    "Generators",
    "Guidance",
    "Method",
    "ModelCall",
    "PartCache",
    "PartCall",
    "Request",
    "Solver",
    "Velocity",
    "choose_sampler",
    "ddim",
    "ddpm",
    "euler",
    "euler_maruyama",
    "evaluate",
    "evaluations",
    "heun",
    "initial_noise",
    "model_calls",
    "plan_parts",
    "sample",
    "sde_drift",
    "time_grid",
    "time_of",
    "times_at",
]
