from __future__ import annotations

import os

import pytest
from digits_run import SHAPE, write_run
from haste.digits import ClassifierConfig, train_classifier
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler
from haste.metrics.evaluator import Evaluator
from haste.metrics.reference import load_reference
from haste.sweep import measure
from haste.sweep.config import Grid, long_name, plan, point_fields
from haste.sweep.measure import Sweep, count_cost, count_flops, time_run
from haste.sweep.records import SweepDir
from haste.training.checkpoint import as_before


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_checkpoint(write_run(tmp_path_factory.mktemp("exps"), steps=(4,)))


def products_of_a_full_evaluation() -> tuple[int, int]:
    """FLOPs of the matrix products of one evaluation of one image: outside the blocks, and in them."""
    width, depth, patch = SHAPE["hidden_size"], SHAPE["depth"], SHAPE["patch_size"] ** 2 * SHAPE["in_channels"]
    tokens = (SHAPE["input_size"] // SHAPE["patch_size"]) ** 2
    embedding = tokens * patch * width + 256 * width + width * width
    final = width * 2 * width + tokens * width * patch
    modulation = width * 6 * width
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    mlp = 2 * tokens * width * 4 * width
    return 2 * (embedding + final), 2 * depth * (modulation + attention + mlp)


def test_flops_are_those_of_every_matrix_product_attentions_included(loaded):
    outside, inside = products_of_a_full_evaluation()
    for settings, evaluations in ((SamplingConfig(num_steps=3), 3), (SamplingConfig(num_steps=3, heun=True), 5)):
        assert count_flops(Sampler(loaded, settings)) == evaluations * (outside + inside)
    guided = SamplingConfig(num_steps=3, cfg_scale=2.0)
    assert count_flops(Sampler(loaded, guided)) == 2 * 3 * (outside + inside)


def test_a_cached_run_costs_its_full_steps_and_little_else(loaded):
    outside, inside = products_of_a_full_evaluation()
    settings = SamplingConfig(num_steps=10, cache="taylor", granularity="model", interval=4, order=1)
    cost = count_cost(Sampler(loaded, settings), batch=3)
    assert (cost["calls"], cost["full_calls"]) == (10, 4)  # 0, 1, 5, 9
    assert 4 * (outside + inside) < cost["flops"] <= 10 * outside + 4 * inside
    tokens = 3 * 16 * SHAPE["hidden_size"]
    assert cost["cache_bytes"] == 2 * tokens * 4  # two snapshots, float32
    assert cost["peak_bytes"] is None or cost["peak_bytes"] >= 0


def test_a_full_run_has_no_cache(loaded):
    cost = count_cost(Sampler(loaded, SamplingConfig(num_steps=3)), batch=3)
    assert (cost["calls"], cost["full_calls"], cost["cache_bytes"]) == (3, 3, 0)


def test_only_the_model_and_the_sampler_are_timed(loaded, monkeypatch):
    timed = []
    monkeypatch.setattr(Sampler, "run", lambda self, start: timed.append(len(start.labels)))
    monkeypatch.setattr(Sampler, "sample", None)
    assert time_run(Sampler(loaded, SamplingConfig(num_steps=3)), batch=5) > 0
    assert timed == [5]


BASE = SamplingConfig(labels="balanced")
GRID = Grid(caches=("taylor",), granularities=("module",), intervals=(1, 3), orders=(1,), steps=(8,))
POINTS = plan(BASE, [GRID], (4,))
QUICK = {"samples": 70, "batch": 40, "repeats": 2}
MEASURED = ("flops", "cache_bytes", "calls", "full_calls", "fd", "label_accuracy", "psnr", "ssim")


@pytest.fixture(scope="module")
def evaluator():
    extractor = train_classifier(ClassifierConfig(epochs=1))
    return Evaluator(extractor, load_reference("digits", extractor))


@pytest.fixture(scope="module")
def whole(loaded, evaluator, tmp_path_factory):
    """A sweep that ran from beginning to end, and what it said on the way."""
    folder = SweepDir(tmp_path_factory.mktemp("whole"))
    sweep = Sweep(loaded, POINTS, evaluator, folder, **QUICK)
    sweep.seen = []
    sweep.run(lambda name, images: sweep.seen.append(images))
    return sweep


@pytest.fixture
def make_sweep(loaded, evaluator, tmp_path):
    def make(points=POINTS, **settings) -> Sweep:
        return Sweep(loaded, points, evaluator, SweepDir(tmp_path / "sweep"), **{**QUICK, **settings})

    return make


def records_of(sweep: Sweep) -> list[dict]:
    return [sweep.folder.find(sweep.shared, point_fields(settings)) for settings in sweep.points]


def test_every_point_is_judged_and_timed(whole):
    assert sum(whole.seen) == whole.images == 4 * (70 + 2 * 40)
    full, fewer, every_step, cached = records_of(whole)
    assert [record["full_calls"] for record in (full, fewer, every_step, cached)] == [8, 4, 8, 4]
    for record in (full, fewer, every_step, cached):
        assert len(record["seconds"]) == len(record["reference_seconds"]) == 2
    assert full["seconds"] == full["reference_seconds"]
    assert full["psnr"] is None and full["ssim"] is None
    assert every_step["psnr"] is None and every_step["ssim"] == pytest.approx(1)  # the same images, every one
    assert every_step["fd"] == full["fd"] != cached["fd"]
    assert fewer["psnr"] > 0 and cached["psnr"] > 0 and fewer["ssim"] < 1 > cached["ssim"]
    assert cached["flops"] < full["flops"] == pytest.approx(2 * fewer["flops"])


@pytest.mark.parametrize("killed_at", [9, 15, 22])  # among the evaluated points, then among the timed ones
def test_a_sweep_that_was_killed_goes_on_and_comes_to_the_same(make_sweep, whole, monkeypatch, killed_at):
    run, draw, runs, drawn = Sampler.run, Sampler.sample, [], []

    def run_until_killed(self, *args):
        runs.append(self)
        if len(runs) == killed_at:
            raise KeyboardInterrupt
        return run(self, *args)

    def draw_and_note(self, *args):
        drawn.append(point_fields(self.settings))
        return draw(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "run", run_until_killed)
        with pytest.raises(KeyboardInterrupt):
            make_sweep().run()
    resumed = make_sweep()
    known = [record for record in records_of(resumed) if "fd" in record]
    timed = [record for record in known if "seconds" in record]
    assert len(known) == 4 and 0 < len(timed) < 4 if killed_at == 22 else 0 < len(known) < 4
    monkeypatch.setattr(Sampler, "sample", draw_and_note)
    resumed.run()
    assert not [
        record for record in known[1:] if record["point"] in drawn
    ]  # the reference is sampled again, as baselines
    for before, after in zip(records_of(whole), records_of(resumed), strict=True):
        assert {name: after[name] for name in MEASURED} == {name: before[name] for name in MEASURED}
        assert len(after["seconds"]) == len(after["reference_seconds"]) == 2
    for record in timed:
        kept = resumed.folder.find(resumed.shared, record["point"])["seconds"]
        assert kept[: len(record["seconds"])] == record["seconds"]


def test_a_second_run_measures_nothing_and_other_settings_measure_anew(make_sweep, monkeypatch):
    make_sweep(repeats=1).run()
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "run", None)
        make_sweep(repeats=1).run()
    again = make_sweep(repeats=3)
    again.run()
    assert all(len(record["seconds"]) == 3 for record in records_of(again))
    assert all("fd" not in record for record in records_of(make_sweep(samples=80)))


def test_what_the_number_of_steps_does_not_allow_is_skipped_with_a_sentence(make_sweep):
    impossible = plan(BASE, [Grid(caches=("taylor",), intervals=(3,), orders=(1, 7), steps=(8,))], ())
    sweep = make_sweep(impossible, repeats=1)
    seen = []
    sweep.run(lambda name, images: seen.append(images))
    (sentence,) = sweep.skipped
    assert sentence.startswith("Taylor per module, interval 3, order 7, 8 steps: --order must be at most")
    assert sum(seen) == sweep.images
    assert ["fd" in record for record in records_of(sweep)] == [True, True, False]


def test_what_is_wrong_with_every_point_is_the_commands_error(make_sweep):
    with pytest.raises(UserError, match="--labels must be classes from 0 to 9"):
        make_sweep(plan(SamplingConfig(labels="12"), [GRID], ())).run()


def test_in_the_sde_agreement_is_with_runs_of_as_many_steps_alone(make_sweep):
    sweep = make_sweep(plan(SamplingConfig(mode="sde"), [GRID], (4,)), repeats=1)
    sweep.run()
    full, fewer, _, cached = records_of(sweep)
    assert fewer["psnr"] is None and cached["psnr"] > 0


def test_all_take_turns_and_each_turn_has_a_reference_of_its_own(make_sweep, monkeypatch):
    timed = []

    def clock(sampler, batch):
        timed.append(point_fields(sampler.settings))
        return float(len(timed))

    monkeypatch.setattr(measure, "time_run", clock)
    sweep = make_sweep()
    sweep.run()
    points = [point_fields(settings) for settings in POINTS]
    first, second = timed[:4], timed[4:]
    for turn in (first, second):
        assert turn[0] == points[0]
        assert sorted(turn, key=str) == sorted(points, key=str)
    assert all(record["reference_seconds"] == [1.0, 5.0] for record in records_of(sweep))


def test_a_checkpoint_that_was_trained_again_is_another_sweep(make_sweep, loaded, evaluator, tmp_path):
    os.utime(loaded.checkpoint, ns=(1, 1))
    before = make_sweep().shared
    loaded.checkpoint.touch()
    assert make_sweep().shared == before
    again = load_checkpoint(write_run(tmp_path, steps=(4,), seed=1))
    assert Sweep(again, POINTS, evaluator, SweepDir(tmp_path / "sweep"), **QUICK).shared != before


def test_a_sweep_of_an_earlier_version_knows_its_checkpoint_by_its_time(make_sweep, whole, loaded, monkeypatch):
    monkeypatch.setattr(Sampler, "run", None)  # nothing is left to draw
    before = as_before(whole.shared, loaded.checkpoint)
    sweep = make_sweep()
    for settings, record in zip(whole.points, records_of(whole), strict=True):
        measured = {name: value for name, value in record.items() if name not in ("sweep", "point")}
        sweep.folder.add(before, point_fields(settings), **measured)
    sweep.run()
    assert records_of(sweep) == records_of(whole) and sweep.folder.complete(before) == []


def test_the_full_steps_of_an_adaptive_schedule_are_measured_once_and_the_same_for_all(make_sweep, monkeypatch):
    points = plan(
        BASE, [Grid(caches=("newton",), intervals=(4,), orders=(1,), error_thresholds=(0.05,), steps=(12,))], ()
    )
    ran = []
    run = Sampler.run

    def run_and_note(self, *args):
        result = run(self, *args)
        ran.append((self.settings.error_threshold, getattr(self.cache, "full_steps", None)))
        return result

    monkeypatch.setattr(Sampler, "run", run_and_note)
    sweep = make_sweep(points)
    sweep.run()
    steps = records_of(sweep)[1]["full_steps"]
    adaptive = [full for error, full in ran if error]
    listed = [full for error, full in ran if full is not None and not error]
    assert adaptive == [steps]
    assert len(listed) >= 6 and all(full == steps for full in listed)


# ---- DiT ----


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return load_checkpoint(write_run(tmp_path_factory.mktemp("exps"), steps=(4,), preset="dit-digits"))


def test_flops_of_a_dit_count_its_noise_and_its_variance(dit):
    outside, inside = products_of_a_full_evaluation()
    tokens = (SHAPE["input_size"] // SHAPE["patch_size"]) ** 2
    outside += 2 * tokens * SHAPE["hidden_size"] * SHAPE["patch_size"] ** 2  # the head once more
    for mode in ("ddim", "ddpm"):
        assert count_flops(Sampler(dit, SamplingConfig(num_steps=3, mode=mode))) == 3 * (outside + inside)


@pytest.mark.parametrize("mode", [None, "ddim", "ddpm"])
def test_a_sweep_of_a_dit(dit, tmp_path, evaluator, mode):
    base = SamplingConfig(num_steps=8, mode=mode, cfg_scale=1.5, labels="balanced")
    grids = [
        Grid(caches=("taylor",), granularities=("module", "output"), intervals=(2,), orders=(1,), steps=(8,)),
        Grid(caches=("delta-dit",), intervals=(2,), steps=(8,)),
    ]
    points = measure.fitting(plan(base, grids, (5,)), dit)
    assert {point.mode for point in points} == {mode or "ddim"} and len(points) == 5
    sweep = Sweep(dit, points, evaluator, SweepDir(tmp_path), 70, 35, 1)
    sweep.run()
    assert not sweep.skipped
    records = {long_name(point): sweep._known(point) for point in points}
    assert list(records) == [
        "8 uncached steps", "5 uncached steps", "Taylor per module, interval 2, order 1, 8 steps",
        "Taylor per output, interval 2, order 1, 8 steps", "Δ-DiT, interval 2, 8 steps",
    ]  # fmt: skip
    assert sweep.shared["settings"]["mode"] == (mode or "ddim")
    assert records["Taylor per output, interval 2, order 1, 8 steps"]["full_calls"] == 5
    # Another number of DDPM's steps has other noise.
    assert (records["5 uncached steps"]["psnr"] is None) == (mode == "ddpm")
