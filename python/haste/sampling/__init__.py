"""From noise to images with a trained model."""

from haste.sampling.guidance import Guidance
from haste.sampling.samplers import SAMPLERS, Evaluation, evaluations, initial_noise, sample

__all__ = ["SAMPLERS", "Evaluation", "Guidance", "evaluations", "initial_noise", "sample"]
