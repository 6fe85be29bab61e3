"""When the alignment of attention helps, on the digits: what is trained, the teacher, layers, heads, coefficients.

    python benchmarks/digits/alignment.py                        every run that is not done yet, then the tables
    python benchmarks/digits/alignment.py --groups teachers      of that, one group of runs
    python benchmarks/digits/alignment.py --seeds 1 2            with other seeds
    python benchmarks/digits/alignment.py --plot-only            the tables from alignment.json alone

Every run changes one thing of its group's base. Beside the scores stands what there was to learn: the divergence
KL(teacher ‖ student) of the attention maps before and after training, and how far the teacher's are from uniform.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import tyro
from haste.alignment import LayerMap
from haste.digits import NUM_CLASSES, augment, load_digits
from haste.generation.loaded import load_checkpoint, run_checkpoints
from haste.io import write_text
from haste.models import build_model, get_family
from haste.tables import format_number, markdown_table
from haste.teachers.encoder import TeacherOutput, VisionTeacher
from haste.training.config import TrainConfig
from torch import Tensor, nn

import haste_ext

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from _common import read_results, write_results  # noqa: E402
from _vits import ViTSettings, kl_from_uniform, prepare_vit, probe_accuracy  # noqa: E402
from run import HERE, MODELS, train_and_score  # noqa: E402

RESULTS = "alignment.json"
STEPS, EVERY = 400, 200
IMAGES, TIMES = 256, (0.1, 0.3, 0.5, 0.7, 0.9)  # on which divergences are measured

ALL_LAYERS = "0:0,1:1,2:2,3:3"  # of the teacher: what the preset aligned before this was asked
BASE_TEACHER = ViTSettings()
METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"attn_coeff": 0.0, "proj_coeff": 0.0},
    "features (REPA)": {"attn_coeff": 0.0},
    "attention": {"proj_coeff": 0.0},
    "both (HASTE)": {},
}


class Variant(NamedTuple):
    """One run. model: of run.py. temperature: of the teacher's attention."""

    settings: dict[str, Any]
    model: str = "sit"
    teacher: ViTSettings = BASE_TEACHER
    temperature: float = 1.0


def regimes() -> dict[str, Variant]:
    """What is trained, and how fast, by each method."""
    kinds = {
        "DiT, 4e-3": ("dit", {}),
        "SiT, 1e-3": ("sit", {"learning_rate": 1e-3}),
        "SiT, 4e-3": ("sit", {}),
    }
    return {
        f"{kind}: {method}": Variant({**own, **settings}, model)
        for kind, (model, own) in kinds.items()
        for method, settings in METHODS.items()
    }


ATTENTION = {"proj_coeff": 0.0}  # alone, of DiT: the base of the groups below, where it does most


def teachers() -> dict[str, Variant]:
    """Attention alone, by teachers that learned something else, less or more."""
    others = {
        "labels, 400 steps": BASE_TEACHER,
        "labels, 50 steps": ViTSettings(steps=50),
        "labels, width 128": ViTSettings(hidden_size=128),
        "masked images": ViTSettings("masked", steps=1000),
        "self-distillation": ViTSettings("distilled", steps=600),
        "untrained": ViTSettings("untrained"),
    }
    return {name: Variant(ATTENTION, "dit", teacher=vit) for name, vit in others.items()}


def settings() -> dict[str, Variant]:
    """Attention alone, with other layers, heads, temperatures and coefficients."""
    changes = {
        **{f"layers {pairs}": {"layer_map": pairs} for pairs in ("0:2,1:3", "2:2,3:3", "4:2,5:3", "0:0,1:1")},
        **{f"coefficient {value:g}": {"attn_coeff": value} for value in (0.1, 2.0, 5.0)},
        **{f"ends at {step}": {"early_stop_point": step} for step in (100, 200)},
    }
    return {
        **{name: Variant({**ATTENTION, **change}, "dit") for name, change in changes.items()},
        **{f"temperature {value:g}": Variant(ATTENTION, "dit", temperature=value) for value in (0.5, 2.0)},
        "1 of 4 heads": Variant(ATTENTION, "dit", teacher=ViTSettings(num_attention_heads=1)),
    }


def preset() -> dict[str, Variant]:
    """SiT at 4e-3 by both losses, as the preset of the digits has it, with what the other groups found."""
    return {
        "all four layers": Variant({}),
        "teacher of width 128": Variant({}, teacher=ViTSettings(hidden_size=128)),
        "layers 2:2,3:3": Variant({"layer_map": "2:2,3:3"}),
        "layers 2:2,3:3, teacher of width 128": Variant({"layer_map": "2:2,3:3"}, teacher=ViTSettings(hidden_size=128)),
    }


GROUPS = {"preset": preset, "regimes": regimes, "teachers": teachers, "settings": settings}


@dataclass
class Args:
    """What to run and where."""

    groups: list[str] = field(default_factory=lambda: list(GROUPS))
    """Of: preset, regimes, teachers, settings."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the training."""
    output_dir: Path = Path("exps/digits-alignment")
    """Where the runs, the teachers and the classifier go."""
    plot_only: bool = False
    """Train nothing: make the tables from the JSON."""


def main(args: Args) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.plot_only:
        for seed in args.seeds:
            for group in args.groups:
                for name, variant in GROUPS[group]().items():
                    do_run(args, group, name, variant, seed)
    text = write_up(stored())
    write_text(HERE / "alignment.md", text)
    print(text)


def stored() -> dict[str, Any]:
    return read_results(HERE, RESULTS) if (HERE / RESULTS).is_file() else {"runs": []}


def do_run(args: Args, group: str, name: str, variant: Variant, seed: int) -> None:
    """Train, score and measure one run, unless it is in the JSON; then write the JSON."""
    key = {"group": group, "name": name, "seed": seed}
    if any(key.items() <= run.items() for run in stored()["runs"]):
        return
    benchmark = MODELS[variant.model]
    images, labels = load_digits()
    folder = prepare_vit(
        args.output_dir / "teachers", "digits", variant.teacher, images, labels, lambda views: augment(views, 0.2)
    )
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    config = TrainConfig.from_preset(
        benchmark.preset,
        **{
            "output_dir": str(args.output_dir),
            "exp_name": f"{group}-{words}-seed{seed}",
            "seed": seed,
            "enc_type": str(folder),
            "max_train_steps": STEPS,
            "checkpointing_steps": EVERY,
            "sampling_steps": 0,
            "early_stop_point": -1,
            "layer_map": ALL_LAYERS,
            **variant.settings,
        },
    )
    with teacher_temperature(variant.temperature):
        scores, _, run = train_and_score(config, args.output_dir / "classifier", benchmark.settings)
        maps = measure_maps(folder, config.layer_map, run_checkpoints(run)[-1])
    runs = stored()["runs"]  # again: another process may have added its own
    runs.append({**key, **scores, **maps, "probe_accuracy": quality(folder)})
    write_results(HERE, {"runs": runs}, RESULTS)


@contextmanager
def teacher_temperature(temperature: float) -> Iterator[None]:
    """L_A against softmax(teacher's logits / temperature), which the trainer has no setting for."""
    operation = haste_ext.attn_align_loss

    def tempered(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, **others: Any) -> Tensor:
        scale = teacher_q.shape[-1] ** -0.5 / temperature
        return operation(student_q, student_k, teacher_q, teacher_k, teacher_scale=scale, **others)

    with mock.patch.object(haste_ext, "attn_align_loss", tempered):
        yield


@cache
def quality(folder: Path) -> float:
    """Accuracy of a linear probe, fitted to four fifths of the digits and tested on the others."""
    images, labels = load_digits()
    held_out = torch.arange(len(images)) % 5 == 0
    return probe_accuracy(folder, images[~held_out], labels[~held_out], images[held_out], labels[held_out])


@torch.no_grad()
def measure_maps(folder: Path, layer_map: str, checkpoint: Path) -> dict[str, float]:
    """Divergences of attention maps, in nats: means over layer pairs, heads, queries, images and times."""
    pairs = LayerMap.parse(layer_map)
    loaded = load_checkpoint(checkpoint, ema=False)
    images, labels = load_digits()
    images, labels = images[:IMAGES], labels[:IMAGES] % NUM_CLASSES
    teacher = VisionTeacher.from_pretrained(str(folder), layers=pairs.teacher, grid=loaded.layout.grid, features=False)
    output = teacher(images)
    torch.manual_seed(loaded.config.seed)
    new = build_model(loaded.model_config).eval()
    return {
        "kl_uniform": float(np.mean([kl_from_uniform(q, k, output.prefix) for q, k in output.queries_keys])),
        "kl_before": kl_from_student(new, images, labels, pairs, output),
        "kl_after": kl_from_student(loaded.model, images, labels, pairs, output),
    }


def kl_from_student(model: nn.Module, images: Tensor, labels: Tensor, pairs: LayerMap, output: TeacherOutput) -> float:
    """The mean of KL(teacher ‖ student) over TIMES, with the same noise for each model."""
    family, noise = get_family(model), torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for share in TIMES:
        t = torch.full((len(images),), family.time(share))
        x, _ = family.interpolate(model, images, noise, t if share == family.time(share) else t.long(), "linear")
        found = model(x, t, labels, pairs.student)
        losses += [
            float(haste_ext.attn_align_loss(
                *student, *teacher, student_prefix=found.prefix, teacher_prefix=output.prefix, divergence="kl"
            ))
            for student, teacher in zip(found.queries_keys, output.queries_keys, strict=True)
        ]  # fmt: skip
    return float(np.mean(losses))


# ---- the tables ----


def write_up(results: dict[str, Any]) -> str:
    """A table for each group: scores at every point, the teacher's quality, and the divergences."""
    lines = ["# Digits: when the alignment of attention helps\n", describe(results)]
    for group in GROUPS:
        runs = [run for run in results["runs"] if run["group"] == group]
        if not runs:
            continue
        steps = [point["step"] for point in runs[0]["points"]]
        head = ["", *(f"FD, {step}" for step in steps), *(f"accuracy, {step}" for step in steps),
                "probe", "KL uniform", "KL before", "KL after"]  # fmt: skip
        names = list(dict.fromkeys(run["name"] for run in runs))
        rows = [row(name, [run for run in runs if run["name"] == name]) for name in names]
        lines.append(f"\n## {group.capitalize()}\n\n{markdown_table([head, *rows])}".rstrip())
    return "\n".join(lines) + "\n"


def row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """Means over seeds, with the standard deviation where there are several."""

    def cell(values: list[float], digits: int, scale: float = 1.0) -> str:
        spread = scale * float(np.std(values, ddof=1)) if len(values) > 1 else None
        return format_number(scale * float(np.mean(values)), digits, spread=spread)

    points = list(zip(*(run["points"] for run in runs), strict=True))
    return [
        name,
        *(cell([point["fd"] for point in at], 2) for at in points),
        *(cell([point["label_accuracy"] for point in at], 1, 100.0) for at in points),
        cell([run["probe_accuracy"] for run in runs], 1, 100.0),
        *(cell([run[key] for run in runs], 3) for key in ("kl_uniform", "kl_before", "kl_after")),
    ]


def describe(results: dict[str, Any]) -> str:
    run = results["runs"][0]
    commits = sorted({run["commit"][:12] + run["commit"][40:] for run in results["runs"]})
    seeds = sorted({run["seed"] for run in results["runs"]})
    return (
        f"`python benchmarks/digits/alignment.py`. Seed {seeds[0]}, or the mean ± standard deviation over {len(seeds)} "
        f"seeds; alignment never stopped unless a row says so; "
        f"{run['points'][0]['samples']:,} samples a point, the classifier of [results.md](results.md). "
        "Accuracy is of the samples' labels, in %; probe: the teacher's own, of a linear map of its features. KL in "
        "nats, of the aligned layers: of the teacher's maps from uniform, and from the student's before and after "
        f"training.\n\nCommit {', '.join(commits)}; torch {run['build']['torch_loaded']}; {run['processor']}; no GPU."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
