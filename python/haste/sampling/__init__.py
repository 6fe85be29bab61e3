"""From noise to images with a trained model."""

from haste.sampling.samplers import SAMPLERS, Evaluation, evaluations, initial_noise, sample

__all__ = ["SAMPLERS", "Evaluation", "evaluations", "initial_noise", "sample"]
