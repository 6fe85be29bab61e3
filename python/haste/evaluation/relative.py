"""FDr: the mean over several networks of the FD relative to that of a baseline (Yang et al., arXiv 2604.28190).

    FDr_φ = FD_φ(samples, reference) / FD_φ(baseline, reference)        FDr = mean of FDr_φ over the networks φ

FDs of two networks have different scales, and their ratios have not. The paper's baseline is as many held-out real
images, whose FDr is 1, and its six networks are Inception, ConvNeXt v2, DINOv2, MAE, SigLIP 2 and CLIP (FDr⁶). Samples
of another model serve as well: below 1 is then better than that model. The baseline is scored first, as samples are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haste.errors import UserError
from haste.evaluation.evaluate import beside
from haste.evaluation.records import read_evaluations
from haste.metrics.evaluator import Evaluation, Result

SAME = ("count", "reference", "reference_count", "dimension")  # settings that both must have been scored with


def relative_fd(evaluations: Sequence[Evaluation], baseline: Path) -> Evaluation:
    """FDr of one set of samples.

    Args:
        evaluations: of the samples, one for each network, each with an FD.
        baseline: a folder or file of images, whose evaluations are beside it, or the file of these evaluations.

    Raises:
        UserError: there is no FD of the samples, or none of the baseline with the same network, reference and numbers
            of images.
    """
    path = baseline if baseline.suffix == ".json" else beside(baseline, "evaluation.json")
    if not path.is_file():
        raise UserError(f"--relative-to must be samples that haste evaluate has scored, got {baseline} without {path}")
    kept = read_evaluations(path)
    ratios = [_fd_of(each) / _baseline_fd(kept, each.settings, path) for each in evaluations]
    first = evaluations[0].settings
    networks = [each.settings["network"] for each in evaluations]
    found = ", ".join(f"{ratio:.3f} in {network}" for ratio, network in zip(ratios, networks, strict=True))
    references = list(dict.fromkeys(each.settings["reference"] for each in evaluations))
    settings = {
        "samples": first["samples"],
        "digest": first.get("digest"),
        "features": [each.settings["features"] for each in evaluations],
        "network": " and ".join(networks),
        "count": first["count"],
        "reference": " and ".join(references),
        "relative_to": str(baseline),
    }
    return Evaluation([Result("fdr", float(np.mean(ratios)), note=f"FD relative to {baseline}: {found}.")], settings)


def _fd_of(evaluation: Evaluation) -> float:
    result = evaluation["fd"]
    if result.value is None:
        raise UserError(f"--relative-to must come with samples that have an FD, got none: {result.note}")
    return result.value


def _baseline_fd(kept: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: Path) -> float:
    """The FD among the baseline's evaluations with the settings of the samples' evaluation."""
    network = settings["network"]
    same_network = [entry for entry in kept if entry["settings"].get("features") == settings["features"]]
    entries = [entry for entry in same_network if "fd" in entry.get("metrics", {})]
    if not entries:
        raise UserError(f"--relative-to must be scored in the features of {network} by haste evaluate, got {path} "
                        "without them")  # fmt: skip
    differences = []
    for entry in entries:
        other = entry["settings"]
        differences = [f"{name} {other.get(name)}, not {settings[name]}" for name in SAME
                       if other.get(name) != settings[name]]  # fmt: skip
        if not differences:
            value = entry["metrics"]["fd"].get("value")
            if not isinstance(value, float) or value <= 0:
                raise UserError(f"--relative-to must have an FD above 0 in the features of {network}, got {value}")
            return value
    raise UserError(f"--relative-to must be scored with the same settings in the features of {network}, got {path} "
                    f"with {', '.join(differences)}")  # fmt: skip
