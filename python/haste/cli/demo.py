"""The stages of `haste demo`, and the commands that do the same by hand."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from haste.caching.config import FAST, CacheConfig
from haste.cli import commands
from haste.errors import UserError
from haste.evaluation.config import EvaluateConfig
from haste.generation.config import SampleConfig
from haste.io import read_json, write_json
from haste.training.config import TrainConfig
from haste.validation import DEFAULT_STEPS, check, check_numbers

EVALUATION_STEPS = 25  # of the evaluated samples; more would be the longest of all stages
FEWEST_EVALUATED = 65  # samples; the covariance of the classifier's 64 features needs more than 64
POINTS = 5  # checkpoints of the run, each of which is evaluated


@dataclass(kw_only=True)
class DemoConfig:
    """The settings of `haste demo`, which are its flags."""

    output_dir: Path = Path("demo")
    """Folder of both runs, the teacher, the classifier and the page."""
    max_train_steps: int = TrainConfig.from_preset("digits").max_train_steps
    """Training steps of each run."""
    seed: int = 0
    """Seed of the training and of the samples."""
    num_steps: int = DEFAULT_STEPS
    """Sampling steps of the images that are compared."""
    interval: int = FAST.resolved_interval
    """Forecast samples: one full step in n."""
    order: int = FAST.resolved_order
    """Forecast samples: the order of the forecast; 0 repeats the last full step."""
    num_images: int = 100
    """Images to sample twice, in full and with most steps forecast."""
    num_fid_samples: int = 700
    """Images to sample of each checkpoint, to evaluate it."""

    def check(self) -> None:
        """Raise UserError for numbers out of bounds, and for a run too short to be evaluated at every point."""
        check_numbers(self)
        if self.max_train_steps < POINTS:
            raise UserError(f"--max-train-steps must be at least {POINTS}, got {self.max_train_steps}")
        if self.num_fid_samples < FEWEST_EVALUATED:
            raise UserError(f"--num-fid-samples must be at least {FEWEST_EVALUATED}, more than the classifier has "
                            f"features, got {self.num_fid_samples}")  # fmt: skip
        self.cache.check_run(self.num_steps)

    @property
    def cache(self) -> CacheConfig:
        """The cache settings of the forecast samples."""
        return replace(FAST, interval=self.interval, order=self.order)

    def check_folder(self) -> None:
        """Raise UserError if --output-dir holds the runs of a demo with other settings."""
        from haste.training.settings import differing_settings, has_begun, known_settings

        for config in (train_config(self), baseline_config(self)):
            folder = Path(config.output_dir).expanduser() / config.exp_name
            record = folder / "args.json"
            if not (has_begun(folder) and record.is_file()):
                continue
            saved = known_settings(read_json(record, "the settings of a run"), str(record))
            if differing_settings(saved, config):
                flags = [
                    f"--{name.replace('_', '-')} {saved.get(name)}, now {getattr(self, name)}"
                    for name in ("max_train_steps", "seed")
                    if saved.get(name) != getattr(self, name)
                ]
                raise UserError(
                    f"--output-dir must be another folder, got {self.output_dir}, which holds {folder.name}, a run "
                    f"with other settings: {'; '.join(flags) or 'see ' + str(record)}"
                )


def run_demo(demo: DemoConfig) -> None:
    """Run every stage, and print the path of the page as the last line."""
    from haste.evaluation import checkpoints
    from haste.generation.sample_dir import sample_to_folder
    from haste.report.demo import DemoResults, write_demo_page

    config, baseline = train_config(demo), baseline_config(demo)
    full, cached = sample_config(demo, config), sample_config(demo, config, cached=True)
    evaluated = evaluate_config(demo, config)

    demo.check_folder()
    clock = StageClock(demo.output_dir / "demo.json")
    with clock.stage("train the teacher, and the model with HASTE", config):
        commands.train(config)
    with clock.stage("train the baseline, without alignment", baseline):
        commands.train(baseline)
    with clock.stage("sample in full", full):
        full_samples = sample_to_folder(full)
        commands.print_samples(full_samples)
    with clock.stage("sample with forecasts", cached):
        cached_samples = sample_to_folder(cached)
        commands.print_samples(cached_samples)
    with clock.stage("evaluate five checkpoints of HASTE", evaluated):
        records, evaluator = checkpoints.evaluate_by_classifier(evaluated)
        print(f"\n{checkpoints.records_text(records, evaluator)}")
    with clock.stage("evaluate five checkpoints of the baseline", evaluate_config(demo, baseline)) as last:
        baseline_records, _ = checkpoints.evaluate_by_classifier(last)
        print(f"\n{checkpoints.records_text(baseline_records, evaluator)}")
    results = DemoResults(config, baseline, full, full_samples, cached, cached_samples, evaluated, records,
                          baseline_records, evaluator)  # fmt: skip
    seconds = clock.seconds()
    page = write_demo_page(demo.output_dir, results, list(clock.commands.values()), seconds)

    width = max(map(len, seconds))
    print("\n" + "\n".join(f"{title:<{width}}  {value:6.1f} s" for title, value in seconds.items()))
    print(page.resolve())


# ---- the settings of the stages ----


def train_config(demo: DemoConfig) -> TrainConfig:
    """The digits preset; another number of steps scales the end of alignment and the steps of checkpoints."""
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


def sample_config(demo: DemoConfig, config: TrainConfig, cached: bool = False) -> SampleConfig:
    """The images of the demo, from the same seeds in full and cached."""
    return SampleConfig(
        ckpt=Path(config.output_dir) / config.exp_name,
        num_fid_samples=demo.num_images,
        num_steps=demo.num_steps,
        labels="balanced",
        global_seed=demo.seed,
        **(demo.cache.cache_fields() if cached else {}),
    )


def evaluate_config(demo: DemoConfig, config: TrainConfig) -> EvaluateConfig:
    """Every checkpoint of a run."""
    run = Path(config.output_dir) / config.exp_name
    return EvaluateConfig(run=run, num_fid_samples=demo.num_fid_samples, num_steps=EVALUATION_STEPS)


Settings = TypeVar("Settings", TrainConfig, SampleConfig, EvaluateConfig)


def command_line(settings: TrainConfig | SampleConfig | EvaluateConfig) -> str:
    """The command that has these settings, as one would type it."""
    defaults: Any
    if isinstance(settings, TrainConfig):
        words, defaults = ["haste", "train", "--preset", "digits"], TrainConfig.from_preset("digits")
    elif isinstance(settings, SampleConfig):
        words, defaults = ["haste", "sample", "--ckpt", str(settings.ckpt)], SampleConfig(ckpt=settings.ckpt)
    else:
        words, defaults = ["haste", "evaluate"], EvaluateConfig()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(defaults, field.name):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


# ---- stages ----


@dataclass
class Stage:
    """The seconds of a stage over all starts of the demo, and whether it is complete."""

    seconds: float = 0.0
    complete: bool = False


class StageClock:
    """Announces stages, and keeps in a file the seconds that each one took over all starts of the demo.

    A stage is known by its command. A complete one keeps its seconds, as running it again only finds nothing to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = read_json(path, "the seconds of the demo's stages") if path.exists() else {}
        self.known = check(known, dict[str, Stage], str(path))
        self.commands: dict[str, str] = {}  # of this start, by title

    @contextmanager
    def stage(self, title: str, settings: Settings) -> Iterator[Settings]:
        """Print the command of these settings, and count the seconds of this block, also if it is interrupted."""
        command = self.commands[title] = command_line(settings)
        print(f"\n[{len(self.commands)}/6] {title}\n$ {command}", flush=True)
        entry = self.known.setdefault(command, Stage())
        begin = perf_counter()
        complete = False
        try:
            yield settings
            complete = True
        finally:
            if not entry.complete:
                entry.seconds += perf_counter() - begin
                entry.complete = complete
                write_json(self.path, {command: asdict(stage) for command, stage in self.known.items()})

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage of this start, by title."""
        return {title: self.known[command].seconds for title, command in self.commands.items()}
