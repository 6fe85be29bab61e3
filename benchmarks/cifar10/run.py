"""Vanilla SiT, REPA, HASTE and HASTE never stopped on CIFAR-10, at equal steps and at equal measured seconds.

    python benchmarks/cifar10/run.py --data-dir CIFAR                 all that is not done yet, then the tables
    python benchmarks/cifar10/run.py --data-dir CIFAR --methods HASTE --seeds 1 2
    python benchmarks/cifar10/run.py --data-dir CIFAR --tokens 256 --device cuda    SiT-S/2 in bf16, for a GPU
    python benchmarks/cifar10/run.py --data-dir CIFAR --time          measure the seconds of a step again
    python benchmarks/cifar10/run.py --data-dir CIFAR --maps          how far the teacher's maps are from uniform
    python benchmarks/cifar10/run.py --plot-only                      tables and plots from the JSON alone

CIFAR is a folder with train/CLASS/ and test/CLASS/, or a tar file of it. A ViT learns the training images first, as
teacher, and another network, which no run sees, scores the samples against the test images. Runs share both, the seeds
of their samples, and for one seed the images, times and noise of every step. What is done is not done again; a killed
run resumes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from haste.alignment import LayerMap
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint, run_checkpoints
from haste.generation.sample_dir import open_sampler
from haste.metrics.evaluator import Evaluator
from haste.metrics.features import extract
from haste.metrics.reference import Reference
from haste.plotting import plot_grid
from haste.teachers.encoder import VisionTeacher
from haste.training.config import TrainConfig
from haste.training.logging import read_log
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from _common import provenance, read_results, train_to_end, write_results  # noqa: E402
from _vits import ViTSettings, kl_from_uniform, prepare_vit, probe_accuracy, to_floats  # noqa: E402
from classifier import ClassifierSettings, as_arrays, load_classifier  # noqa: E402
from images import CLASSES, augment, find_data, read_images  # noqa: E402
from report import write_report  # noqa: E402

HERE = Path(__file__).resolve().parent

METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"attn_coeff": 0.0, "proj_coeff": 0.0},
    "REPA": {"attn_coeff": 0.0},
    "HASTE": {},
    "HASTE, never stopped": {"early_stop_point": -1},
}
POINTS = 5
TIMED = {"rounds": 3, "steps": 12, "skipped": 4}  # of each method in turn


@dataclass(frozen=True)
class Scale:
    """What is trained. layers: of student and teacher whose attention is aligned."""

    model: dict[str, Any]
    layers: str
    encoder_depth: int
    teacher: ViTSettings
    classifier: ClassifierSettings
    steps: int
    samples: int
    settings: dict[str, Any]


# HASTE's rule at these depths: layers a quarter of the way up, by the teacher's last ones; features a little above.
_TEACHER = ViTSettings(
    image_size=32, num_channels=3, patch_size=4, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
    initializer_range=0.02, steps=2000, batch_size=64, learning_rate=1e-3,
)  # fmt: skip
SCALES = {
    64: Scale(
        {"model": "SiT-S/4", "depth": 8, "hidden_size": 160, "num_heads": 5},
        "2:1,3:2,4:3", 4, _TEACHER, ClassifierSettings(), 800, 500,
        {"batch_size": 32, "learning_rate": 1e-3, "projector_dim": 320, "ema_decay": 0.99, "mixed_precision": "no"},
    ),
    256: Scale(
        {"model": "SiT-S/2"},
        "2:3,3:4,4:5", 5,
        ViTSettings(**{
            **asdict(_TEACHER), "patch_size": 2, "hidden_size": 384, "num_hidden_layers": 6,
            "num_attention_heads": 6, "steps": 2000,
            "batch_size": 256,
        }),
        ClassifierSettings(epochs=10, width=64), 1000, 5000,
        {"batch_size": 256, "learning_rate": 5e-4, "projector_dim": 2048, "ema_decay": 0.995,
         "mixed_precision": "bf16"},
    ),
}  # fmt: skip
"""By the number of tokens of an image."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, by argparse: a borrowed machine may lack tyro."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="CIFAR-10: a folder with train/CLASS/ and test/CLASS/, or a tar file of it")
    add("--output-dir", type=Path, default=Path("exps/cifar10-benchmark"), help="Runs, teacher and classifier")
    add("--results", type=Path, help="Folder of the JSON, tables and plots. Default: tokens-N beside the script")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--tokens", type=int, choices=SCALES, default=64, help="Of an image: 64 (8 x 8 on two cores) or 256 (a GPU)")
    add("--teacher", choices=("labels", "masked", "distilled"), default="labels", help="What the teacher learns by")
    add("--steps", type=int, help="Of a run. Default: 800 with 64 tokens, 1,000 with 256")
    add("--samples", type=int, help="Of each point. Default: 500 with 64 tokens, 5,000 with 256")
    add("--num-steps", type=int, default=16, help="Euler steps of a sample")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--time", action="store_true", help="Measure the seconds of a step again, of each method in turn, then end")
    add("--maps", action="store_true", help="Measure how far the teacher's aligned maps are from uniform, then end")
    add("--plot-only", action="store_true", help="Train nothing")
    args = parser.parse_args(arguments)
    args.results = (
        args.results or HERE / f"tokens-{args.tokens}{'' if args.teacher == 'labels' else '-' + args.teacher}"
    )
    args.steps = args.steps or SCALES[args.tokens].steps
    args.samples = args.samples or SCALES[args.tokens].samples
    if args.steps % (2 * POINTS):
        parser.error(f"argument --steps: must be a multiple of {2 * POINTS}, got {args.steps}")
    if not args.plot_only and args.data_dir is None:
        parser.error("argument --data-dir: must be CIFAR-10 as image files, got nothing")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: must be cpu, as torch finds no CUDA device here, got cuda")
    return args


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.plot_only:
        Benchmark(args).run()
    print(write_report(args.results, stored(args), list(METHODS)))


def stored(args: argparse.Namespace) -> dict[str, Any]:
    """The JSON, or what it is before the first run."""
    return read_results(args.results) if (args.results / "results.json").is_file() else {"runs": []}


class Benchmark:
    """The data, the teacher and the classifier of a scale, and what is done with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.scale = args, SCALES[args.tokens]
        args.output_dir.mkdir(parents=True, exist_ok=True)
        args.results.mkdir(parents=True, exist_ok=True)
        self.data = find_data(args.data_dir, args.output_dir)
        self.settings = SamplingConfig(num_steps=args.num_steps, mode="ode", labels="balanced")

    def run(self) -> None:
        train, test = read_images(self.data / "train"), read_images(self.data / "test")
        teacher = ViTSettings(**{**asdict(self.scale.teacher), "objective": self.args.teacher})
        self.teacher = prepare_vit(self.args.output_dir / "teachers", "cifar10", teacher, *train, augment)
        if self.args.maps or "kl_uniform" not in stored(self.args):
            self.keep({"kl_uniform": self.measure_maps(test[0])})
        if self.args.maps:
            return
        if self.args.time or "seconds_per_step" not in stored(self.args):
            self.keep({"seconds_per_step": self.time_steps()})
        if self.args.time:
            return
        classifier = load_classifier(self.args.output_dir, self.scale.classifier, train, test)
        real = extract(classifier, as_arrays(test[0]), 500)
        evaluator = Evaluator(classifier, Reference("CIFAR-10 test images", classifier.key, real.values))
        if "classifier" not in stored(self.args):
            self.keep({
                "teacher": {**asdict(teacher), "probe_accuracy": probe_accuracy(
                    self.teacher, train[0][::5], train[1][::5], test[0], test[1])},
                "classifier": {**asdict(self.scale.classifier), "held_out_accuracy": classifier.held_out_accuracy,
                               "split_half_fd": evaluator.split_half_fd, "real": len(real)},
                "sampling": self.settings.sampling_fields(),
            })  # fmt: skip
        for seed in self.args.seeds:
            for method in self.args.methods:
                self.do_run(method, seed, evaluator)

    def keep(self, values: dict[str, Any]) -> None:
        """Put values into the JSON, in which another process may have written meanwhile."""
        write_results(self.args.results, {**stored(self.args), **values})

    def config(self, method: str, seed: int, **others: Any) -> TrainConfig:
        """The settings of a run."""
        args, scale = self.args, self.scale
        words = method.lower().replace(", ", "-").replace(" ", "-")
        return TrainConfig(**{
            "data_dir": str(self.data / "train"), "resolution": 32, "output_dir": str(args.output_dir), "seed": seed,
            "exp_name": f"{args.tokens}-{args.teacher}-{words}-seed{seed}", "enc_type": str(self.teacher),
            **scale.model, **scale.settings, "layer_map": scale.layers, "encoder_depth": scale.encoder_depth,
            "attn_coeff": 0.5, "early_stop_point": args.steps // 2 if method == "HASTE" else -1,
            "max_train_steps": args.steps, "checkpointing_steps": args.steps // POINTS, "logging_steps": 10,
            "sampling_steps": 0, "num_workers": 0 if args.device == "cpu" else 8, **METHODS[method], **others,
        })  # fmt: skip

    def do_run(self, method: str, seed: int, evaluator: Evaluator) -> None:
        """Train and score one run, unless it is in the JSON; then put it there."""
        config = self.config(method, seed)
        settings = {name: value for name, value in asdict(config).items() if not name.endswith("_dir")}
        settings["enc_type"] = self.teacher.name
        if any(
            run["settings"].items() <= settings.items() and run["samples"] == self.args.samples
            for run in stored(self.args)["runs"]
        ):
            print(f"{method}, seed {seed}: done before")
            return
        folder = train_to_end(config)
        points = [
            self.score(checkpoint, evaluator, self.args.results / f"{config.exp_name}.png")
            for checkpoint in run_checkpoints(folder)
        ]
        run = {"method": method, "seed": seed, "points": points, "samples": self.args.samples, "settings": settings}
        run |= {"log": [line for line in read_log(folder / "log.jsonl").lines if line["step"] % 100 == 0]}
        run |= provenance()
        others = [old for old in stored(self.args)["runs"] if (old["method"], old["seed"]) != (method, seed)]
        runs = sorted([*others, run], key=lambda run: (list(METHODS).index(run["method"]), run["seed"]))
        self.keep({"runs": runs})

    def score(self, checkpoint: Path, evaluator: Evaluator, picture: Path) -> dict[str, Any]:
        """FD and label accuracy of a checkpoint's samples, of which the first ones become a picture."""
        loaded = load_checkpoint(checkpoint)
        images, labels = open_sampler(loaded, self.settings).sample_batches(self.args.samples, 250)
        values = evaluator.values(extract(evaluator.extractor, images, 500), labels, ("fd", "label_accuracy"))
        plot_grid(picture, images[: 4 * CLASSES], labels[: 4 * CLASSES].tolist(), title=f"{picture.stem}, step "
                  f"{loaded.step:,}: {self.settings.describe()}")  # fmt: skip
        return {"step": loaded.step, **values}

    def measure_maps(self, images: Tensor) -> list[float]:
        """KL(map ‖ uniform) of each aligned layer of the teacher, in nats, on every fortieth test image."""
        layers = LayerMap.parse(self.scale.layers).teacher
        grid = round(self.args.tokens**0.5)
        teacher = VisionTeacher.from_pretrained(str(self.teacher), layers=layers, grid=grid, features=False)
        output = teacher(to_floats(images[::40]))
        return [round(kl_from_uniform(q, k, output.prefix), 4) for q, k in output.queries_keys]

    def time_steps(self) -> dict[str, float]:
        """Seconds of a step by method, the shortest of some rounds in which the methods take turns; each in a new run,
        whose first steps do not count."""
        speeds: dict[str, list[float]] = {"vanilla": [], "REPA": [], "HASTE": []}
        for number in range(TIMED["rounds"]):
            for method, found in speeds.items():
                name = f"timed-{self.args.tokens}-{method}-{number}-{np.random.default_rng().integers(2**32)}"
                short = partial(self.config, method, 0, exp_name=name, logging_steps=TIMED["skipped"])
                config = short(max_train_steps=TIMED["steps"], checkpointing_steps=10**9, early_stop_point=-1)
                lines = read_log(train_to_end(config) / "log.jsonl").lines[1:]
                found.append(config.batch_size / float(np.median([line["images_per_second"] for line in lines])))
        return {method: min(found) for method, found in speeds.items()}


if __name__ == "__main__":
    main(parse())
