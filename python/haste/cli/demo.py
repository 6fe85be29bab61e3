"""The stages of `haste demo`, and the commands that do the same by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from haste.caching.config import FAST
from haste.cli import commands
from haste.errors import UserError
from haste.evaluation.config import EvaluateConfig
from haste.generation.config import SampleConfig
from haste.io import read_json, write_json
from haste.training.config import TrainConfig
from haste.validation import DEFAULT_STEPS, check, check_numbers

EVALUATION_STEPS = 25  # of the samples that are evaluated; more would take the longest of all stages
POINTS = 5  # checkpoints of the run, each of which is evaluated


@dataclass(kw_only=True)
class DemoConfig:
    """The settings of `haste demo`, which are its flags."""

    output_dir: Path = Path("demo")
    """Where both runs, the teacher, the classifier and the page go."""
    max_train_steps: int = TrainConfig.from_preset("digits").max_train_steps
    """Training steps of either run."""
    seed: int = 0
    """Seed of the training and of the samples."""
    num_steps: int = DEFAULT_STEPS
    """Sampling steps of the images that are compared."""
    interval: int = FAST.resolved_interval
    """Where steps are forecast: one full step every n."""
    order: int = FAST.resolved_order
    """Where steps are forecast: the order; 0 repeats the last full step."""
    num_images: int = 100
    """Images that are sampled twice, in full and with most steps forecast."""
    num_fid_samples: int = 700
    """Images per checkpoint that is evaluated."""

    def check(self) -> None:
        """UserError for numbers beyond their bounds, and for a run too short to be evaluated at every point."""
        check_numbers(self)
        if self.max_train_steps < POINTS:
            raise UserError(f"--max-train-steps must be at least {POINTS}, got {self.max_train_steps}")


def run_demo(demo: DemoConfig) -> None:
    """Run every stage, and print the path of the page as the last line."""
    from haste.evaluation import runs
    from haste.generation.sample_dir import sample_to_folder
    from haste.report.demo import DemoResults, write_demo_page

    clock = StageClock(demo.output_dir / "demo.json")
    config, baseline = train_config(demo), baseline_config(demo)
    full, cached = sample_args(demo, config), sample_args(demo, config, cached=True)
    evaluated, baseline_evaluation = evaluate_args(demo, config), evaluate_args(demo, baseline)
    lines = command_lines(config, baseline, full, cached, evaluated, baseline_evaluation)

    with clock.stage("train the teacher, and the model with HASTE", lines[0]):
        commands.train(config)
    with clock.stage("train the baseline, without alignment", lines[1]):
        commands.train(baseline)
    with clock.stage("sample in full", lines[2]):
        full_samples = sample_to_folder(full)
        commands.print_samples(full_samples)
    with clock.stage("sample with forecasts", lines[3]):
        cached_samples = sample_to_folder(cached)
        commands.print_samples(cached_samples)
    with clock.stage("evaluate five checkpoints of HASTE", lines[4]):
        records, evaluator = runs.evaluate_by_classifier(evaluated)
        print(f"\n{runs.records_text(records, evaluator)}")
    with clock.stage("evaluate five checkpoints of the baseline", lines[5]):
        baseline_records, _ = runs.evaluate_by_classifier(baseline_evaluation)
        print(f"\n{runs.records_text(baseline_records, evaluator)}")
    results = DemoResults(config, baseline, full, full_samples, cached, cached_samples, evaluated, records,
                          baseline_records, evaluator)  # fmt: skip
    page = write_demo_page(demo.output_dir, results, lines, clock.seconds())

    width = max(map(len, clock.seconds()))
    print("\n" + "\n".join(f"{title:<{width}}  {seconds:6.1f} s" for title, seconds in clock.seconds().items()))
    print(page.resolve())


def train_config(demo: DemoConfig) -> TrainConfig:
    """The digits preset, shortened or lengthened as a whole: its end of alignment and its checkpoints move along."""
    preset = TrainConfig.from_preset("digits")
    steps = demo.max_train_steps
    return replace(
        preset,
        output_dir=str(demo.output_dir),
        max_train_steps=steps,
        early_stop_point=round(preset.early_stop_point * steps / preset.max_train_steps),
        checkpointing_steps=max(steps // POINTS, 1),
        seed=demo.seed,
    )


def baseline_config(demo: DemoConfig) -> TrainConfig:
    """The same run without alignment, which is vanilla SiT."""
    return replace(train_config(demo), exp_name="baseline", attn_coeff=0.0, proj_coeff=0.0)


def sample_args(demo: DemoConfig, config: TrainConfig, cached: bool = False) -> SampleConfig:
    """The images of the demo, the same seeds in full and cached."""
    return SampleConfig(
        ckpt=Path(config.output_dir) / config.exp_name,
        num_fid_samples=demo.num_images,
        num_steps=demo.num_steps,
        labels="balanced",
        global_seed=demo.seed,
        **(replace(FAST, interval=demo.interval, order=demo.order).cache_fields() if cached else {}),
    )


def evaluate_args(demo: DemoConfig, config: TrainConfig) -> EvaluateConfig:
    """Every checkpoint of the run."""
    run = Path(config.output_dir) / config.exp_name
    return EvaluateConfig(run=run, num_fid_samples=demo.num_fid_samples, num_steps=EVALUATION_STEPS)


def command_lines(
    config: TrainConfig,
    baseline: TrainConfig,
    full: SampleConfig,
    cached: SampleConfig,
    evaluated: EvaluateConfig,
    baseline_evaluation: EvaluateConfig,
) -> list[str]:
    """The commands that do what the demo does, to be typed by hand."""
    preset, usual = TrainConfig.from_preset("digits"), SampleConfig(ckpt=full.ckpt)
    return [
        *("haste train --preset digits " + flags(run, preset) for run in (config, baseline)),
        *(f"haste sample --ckpt {shlex.quote(str(one.ckpt))} " + flags(one, usual) for one in (full, cached)),
        *("haste evaluate " + flags(one, EvaluateConfig()) for one in (evaluated, baseline_evaluation)),
    ]


def flags(args: Any, defaults: Any) -> str:
    """The flags that make `args` out of `defaults`, as one would type them."""
    words = []
    for field in fields(args):
        value, default = getattr(args, field.name), getattr(defaults, field.name)
        if value != default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


@dataclass
class Stage:
    """seconds: over all starts of the demo; complete: whether it came to its end."""

    seconds: float = 0.0
    complete: bool = False


class StageClock:
    """Announces stages, and keeps in a file the seconds that each one took over all starts of the demo.

    A stage is known by its command. One that is complete keeps its seconds: going over it again only finds that
    nothing is left to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = read_json(path, "the seconds of the demo's stages") if path.exists() else {}
        self.known = check(known, dict[str, Stage], f"{path}")
        self.stages: dict[str, str] = {}  # title -> command, of this start

    @contextmanager
    def stage(self, title: str, command: str) -> Iterator[None]:
        """Print the command, and count the seconds of what runs inside, also when it is interrupted."""
        self.stages[title] = command
        print(f"\n[{len(self.stages)}/6] {title}\n$ {command}", flush=True)
        entry = self.known.setdefault(command, Stage())
        begin = perf_counter()
        complete = False
        try:
            yield
            complete = True
        finally:
            if not entry.complete:
                entry.seconds += perf_counter() - begin
                entry.complete = complete
                write_json(self.path, {command: asdict(stage) for command, stage in self.known.items()})

    def seconds(self) -> dict[str, float]:
        """Seconds per stage of this start, by title."""
        return {title: self.known[command].seconds for title, command in self.stages.items()}
