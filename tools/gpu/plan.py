"""The stages in their order: what decides whether the rest is worth its time first, what takes longest last."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from gpu import sanitizer
from gpu.runner import Run
from gpu.stage import Stage

HERE = Path(__file__).resolve().parent
PROGRAMS = "tools/gpu"
KINDS = ("probe", "build", "smoke", "timing", "correctness", "compile", "sanitizers", "benchmark")
LOSS = "attn_align_loss"
WITH_ONE_KERNEL = "token_cosine_loss or taylor_extrapolate"
COMPILED = "inductor or compile or graph_break"
OPERATIONS_TESTS = ("tests/haste_ext", "--ignore=tests/haste_ext/bench")
WHOLE_NETWORK = ("taylor_extrapolate_blocks", "taylor_extrapolate_steps")
WORKERS = 8
# The shapes that targets are stated for: 65,536 tokens of SiT-XL/2. Of taylor_extrapolate_blocks and _steps the
# operands are the snapshots of a whole network.
BENCHMARK = "--device cuda --dtype bfloat16 --preset sit-xl --min-seconds 0.3"
SHAPES = "--tokens 256 1024 4096 --batch 256 64 16"
NETWORK_SHAPES = "--tokens 256 1024 --batch 32 8"


def plan(what: str = "operations", only: Sequence[str] = ()) -> list[Stage]:
    """The stages of a run. only: kinds of stages; the machine is probed in any case, and so is what the build holds."""
    chosen = [stage for stage in everything(what) if not only or stage.kind in (*only, "probe", "build")]
    if only and "build" not in only:
        chosen = [built() if stage.kind == "build" else stage for stage in chosen]
    return chosen[:1] if tuple(only) == ("probe",) else chosen


def everything(what: str) -> list[Stage]:
    begin = [probe(), build(), *smoke()]
    if what == "training":
        return [*begin, training()]
    if what == "sampling":
        return [*begin, *sampling()]
    if what == "cifar10":
        return [*begin, cifar10()]
    return [*begin, *timing(), *correctness(), compile_tests(), *sanitizers(), *benchmarks()]


def probe() -> Stage:
    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return python(f"{PROGRAMS}/probe.py", str(run.scratch / "probe.json"), run.sanitizer)

    return Stage("probe", "probe", 45, command, output="probe.json")


def build() -> Stage:
    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return python(f"{PROGRAMS}/build_tree.py", str(run.scratch / "build.json"))

    return Stage("build", "build", 180, command, output="build.json")


def built() -> Stage:
    """In place of the build: what an earlier one holds."""

    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return python(f"{PROGRAMS}/build_tree.py", str(run.scratch / "build.json"), "built")

    return Stage("earlier build", "build", 45, command, output="build.json")


def smoke() -> list[Stage]:
    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return python(f"{PROGRAMS}/smoke.py", "cuda", "--groups", *groups)

    def compile_and_run(run: Run, groups: Sequence[str]) -> list[str]:
        source, program = f"{PROGRAMS}/wgmma_n72.cu", quote(str(run.scratch / "wgmma_n72"))
        compiler = "nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc"
        return ["sh", "-c", f"{compiler} {source} -o {program} && {program}"]

    shared, portable, hopper = (
        Stage(f"smoke {g}", "smoke", 60, command, (g,)) for g in ("shared", "portable", "hopper")
    )
    return [shared, portable, Stage("wgmma n72", "smoke", 60, compile_and_run, ("hopper",)), hopper]


def timing() -> list[Stage]:
    stages = []
    for group, limit in (("hopper", 60), ("portable", 45)):
        output = f"kernel_times_{group}.json"

        def command(run: Run, groups: Sequence[str], output: str = output) -> list[str]:
            return python(f"{PROGRAMS}/kernel_times.py", "--output", str(run.scratch / output))

        stages.append(Stage(f"timing {group}", "timing", limit, command, (group,), output=output))
    return stages


def correctness() -> list[Stage]:
    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return pytest(OPERATIONS_TESTS, 25, f"cuda and not ({COMPILED}) and ({of_groups(groups)})")

    return [
        Stage("correctness shared", "correctness", 60, command, ("shared",)),
        Stage("correctness portable", "correctness", 75, command, ("portable",), operation=LOSS),
        Stage("correctness hopper", "correctness", 75, command, ("hopper",), operation=LOSS),
    ]


def compile_tests() -> Stage:
    """Inductor takes long; a kernel is verified without them."""

    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return pytest(OPERATIONS_TESTS, 50, f"cuda and ({COMPILED}) and ({of_groups(groups)})")

    return Stage("compile", "compile", 60, command, ("shared", "portable", "hopper"))


def sanitizers() -> list[Stage]:
    """Each tool on the portable kernels and on Hopper's; what has one kernel each runs with the portable ones."""
    return [
        sanitizer_stage(tool, kernels, groups)
        for tool in sanitizer.TOOLS
        for kernels, groups in (("portable", ("shared", "portable")), ("hopper", ("hopper",)))
    ]


def sanitizer_stage(tool: str, kernels: str, its_groups: tuple[str, ...]) -> Stage:
    output = f"{tool}_{kernels}.log"

    def command(run: Run, groups: Sequence[str]) -> list[str]:
        watch = sanitizer.command(run.sanitizer, tool, run.machine.get("sanitizer_help", ""), run.scratch / output)
        return [*watch, *python(f"{PROGRAMS}/smoke.py", "cuda", "--sanitized", "--groups", *groups)]

    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else what lies beyond one tensor is the next
    return Stage(
        f"{tool} {kernels}", "sanitizers", 45, command, its_groups, output=output, tool=tool, environment=uncached
    )


def benchmarks() -> list[Stage]:
    """Beside the other ways of writing the operations."""
    either = ("portable", "hopper")
    return [
        Stage("host time", "benchmark", 30, host_time, either, requires=("shared",), output="host_time.json"),
        benchmark("benchmark network", 75, WHOLE_NETWORK, NETWORK_SHAPES, ("shared",)),
        benchmark("benchmark shared", 60, ("token_cosine_loss", "taylor_extrapolate"), SHAPES, ("shared",)),
        benchmark("benchmark attn_align_loss", 180, (LOSS,), SHAPES, either),
    ]


def host_time(run: Run, groups: Sequence[str]) -> list[str]:
    words = ["-m", "haste_ext.bench", "host", "--device", "cuda", "--min-seconds", "0.5"]
    return python(*words, "--output", str(run.scratch / "host_time.json"))


def benchmark(name: str, limit: float, operations: Sequence[str], shapes: str, groups: tuple[str, ...]) -> Stage:
    output = f"{name.replace(' ', '_')}.json"

    def command(run: Run, left: Sequence[str]) -> list[str]:
        words = ["-m", "haste_ext.bench", *BENCHMARK.split(), *shapes.split(), "--op", *operations]
        return python(*words, "--output", str(run.scratch / output))

    return Stage(name, "benchmark", limit, command, groups, output=output)


def training() -> Stage:
    def command(run: Run, groups: Sequence[str]) -> list[str]:
        return python("benchmarks/train_step/run.py", "--device", "cuda", "--output", str(run.folder / "train_step"))

    return Stage("train_step", "training", 300, command, ("portable", "hopper"), requires=("shared",))


def sampling() -> list[Stage]:
    """The largest batch takes longest and comes last; a run that is cut off has the others."""

    def tests(run: Run, groups: Sequence[str]) -> list[str]:
        return pytest(("tests/haste/caching",), 60)

    stages = [Stage("caching", "sampling", 90, tests, ("shared",))]
    for batch, limit in ((1, 90), (8, 90), (64, 150)):

        def command(run: Run, groups: Sequence[str], batch: int = batch) -> list[str]:
            words = [
                "benchmarks/sampling/run.py",
                "--device",
                "cuda",
                "--model",
                "SiT-XL/2",
                "--batch-size",
                str(batch),
            ]
            return python(*words, "--output", str(run.folder / "sampling"))

        stages.append(Stage(f"sampling, batch {batch}", "sampling", limit, command, ("shared",)))
    return stages


def cifar10() -> Stage:
    """A run that is cut off keeps the methods that are done."""

    def command(run: Run, groups: Sequence[str]) -> list[str]:
        words = ["benchmarks/cifar10/run.py", "--device", "cuda", "--tokens", "256", "--data-dir", str(run.cifar10)]
        words += ["--steps", "500", "--samples", "2000"]
        return python(*words, "--output-dir", str(run.scratch), "--results", str(run.folder / "cifar10"))

    return Stage("cifar10", "training", 400, command, ("portable", "hopper"), requires=("shared",))


def of_groups(groups: Sequence[str]) -> str:
    """pytest's expression for the tests that run the kernels of these groups alone."""
    alternatives = [WITH_ONE_KERNEL] if "shared" in groups else []
    if {"portable", "hopper"} & set(groups):
        alternatives.append(f"not ({WITH_ONE_KERNEL})")
    return " or ".join(alternatives)


def pytest(tests: Sequence[str], limit: int, select: str = "") -> list[str]:
    """In parallel and with a limit for each test where the plugins are there; else a hang still names its test."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.record_tests"]
    words += ["-o", f"faulthandler_timeout={limit - 5}"]
    if find_spec("xdist"):
        words += ["-n", str(WORKERS)]
    if find_spec("pytest_timeout"):
        words += ["--timeout", str(limit), "--timeout-method", "thread"]  # no signal ends a wait for the GPU
    return python(*words, *tests, *(["-k", select] if select else []))


def python(*words: str) -> list[str]:
    return [sys.executable, *words]
