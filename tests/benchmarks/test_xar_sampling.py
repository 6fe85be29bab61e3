"""The benchmark of xAR's sampling: its baseline samples what haste samples, and costs what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark_scripts import script_folder
from haste._compat import flop_counter
from haste.errors import UserError

ROOT = Path(__file__).parents[2] / "benchmarks" / "xar_sampling"

with script_folder(ROOT):
    import cases
    import report
    import rounds
    import run
    from published import PublishedSampler

SMALL = {
    "model": "xAR-Digits", "batch": 2, "dtype": "float32", "num_steps": 4, "cfg_scale": 2.7, "interval": 2, "order": 1,
    "stagger": 1,
}  # fmt: skip


def small(**settings) -> cases.Case:
    return cases.make_case(**{**SMALL, **settings})


@pytest.fixture(scope="module")
def result() -> dict:
    return rounds.measure(small(), rounds=2)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_published_loop_samples_what_haste_samples(batch):
    published, ours, forecast, staggered, _ = (each() for each in cases.make_runs(small(batch=batch)))
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-5 * published.abs().max().item())
    for other in (forecast, staggered):
        assert (other - published).abs().max() > 1e-3, "other images, that take less"


def test_the_published_ode():
    each, _, *_ = cases.make_runs(small())
    model, noise = each.model, each.noise.split(64, dim=1)
    images = PublishedSampler(model)(noise, None, each.labels, 3, 2.7)
    solve = cases.Solver(num_steps=3, cfg_scale=2.7, null=cases.CLASSES)
    ours = model.entities.split(cases.sample_parts(model, each.noise, each.labels, solve))
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-5)


def test_what_the_published_loop_costs():
    published, ours, *_ = cases.make_runs(small(batch=1))
    with flop_counter() as counter:
        published()
    counted = published.count()
    assert counted["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert counted["evaluations"] == published.sampler.evaluations == 16
    assert counted["cache_bytes"] == published.sampler.cache_bytes
    assert counted["flops"] > ours.count()["flops"]


def test_rows_and_table(result):
    names = [row["name"] for row in result["rows"]]
    assert names == ["as published", "haste", "haste, forecast", "haste, staggered", "haste, staggered, forecast"]
    assert [row["rounds"] for row in result["rows"]] == [16, 16, 16, 7, 7]
    assert [row["evaluations"] for row in result["rows"]][:4] == [16, 16, 8, 7]
    assert all(len(row["seconds"]) == 2 for row in result["rows"])
    assert result["rows"][1]["difference"] <= 1e-5 < result["rows"][2]["difference"]
    table = report.report({"results": [result]})
    assert "xAR-Digits, batch 2, 4 steps a cell" in table and table.count("\n| haste") == 4


def test_aims_are_said_to_be_met_or_missed(result):
    rows = [{**row, "seconds": [4.0 - 2.5 * number, 4.0 - 2.5 * number]}
            for number, row in enumerate(result["rows"][:2])]  # fmt: skip
    eight = {**result, "case": {**result["case"], "batch": 8}, "rows": rows}
    assert report.verdicts(eight) == ["- haste: 2.67× “as published”; aim 1.4: met."]
    rows[1]["seconds"] = [3.9, 3.9]
    assert report.verdicts(eight)[0].endswith("aim 1.4: missed.")


def test_more_rounds_of_the_same_case(result):
    joined = rounds.join_rounds(result, result)
    assert joined["settings"]["rounds"] == 4
    assert all(len(row["seconds"]) == 4 for row in joined["rows"])
    with pytest.raises(UserError, match="--add"):
        rounds.join_rounds({**result, "rows": result["rows"][:2]}, result)


def test_images_that_are_not_the_published_ones_are_not_timed():
    published = torch.arange(6.0)
    images = {"as published": published, "haste": published * (1 + 1e-4)}
    with pytest.raises(UserError, match="differ"):
        rounds.check(small(), images)


@pytest.mark.parametrize(
    ("flag", "settings"),
    [("--model", {"model": "SiT-B/2"}), ("--dtype", {"dtype": "float16"}), ("--batch-size", {"batch": 0}),
     ("--num-steps", {"num_steps": 1}), ("--cfg-scale", {"cfg_scale": 1.0}), ("--stagger", {"stagger": 0})],
)  # fmt: skip
def test_settings_that_cannot_be_measured(flag, settings):
    with pytest.raises(UserError, match=flag):
        small(**settings)


def test_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device"):
        run.main(run.parse(["--device", "cuda"]))
