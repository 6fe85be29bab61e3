from __future__ import annotations

import numpy as np
import pytest
from haste.plotting import (
    DARK,
    LIGHT,
    plot_advantage,
    plot_grid,
    plot_losses,
    plot_scores,
    plot_step_errors,
    robust_limits,
    smooth,
    wrapped,
)
from PIL import Image

LOG = [
    {
        "step": step,
        "loss": 1.0 / step,
        "proj_loss": -0.5 if step < 50 else None,
        "attn_loss": 2.0 if step < 50 else None,
    }
    for step in range(1, 101)
]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def share(path, colour: str | tuple[int, int, int]) -> float:
    """The share of an image that has exactly this colour."""
    if isinstance(colour, str):
        colour = tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return float((pixels(path) == np.array(colour)).all(axis=1).mean())


def flat_images(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_a_grid_shows_every_image_without_smoothing(tmp_path, theme):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    plot_grid(tmp_path / "grid.png", flat_images(*colours), [0, 1, 2], title="three", columns=2, theme=theme)
    shares = [share(tmp_path / "grid.png", colour) for colour in colours]
    assert min(shares) > 0.05 and max(shares) < 1.1 * min(shares)
    assert share(tmp_path / "grid.png", theme.background) > 0.2


@pytest.mark.parametrize(("side", "shown"), [(200, 200), (256, 256), (512, 256)])
def test_a_grid_shows_larger_images_in_their_own_size_up_to_a_limit(tmp_path, side, shown):
    images = np.full((12, side, side, 3), (200, 0, 0), dtype=np.uint8)
    plot_grid(tmp_path / "grid.png", images, range(12), title="twelve")
    red = (np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")) == (200, 0, 0)).all(axis=2)
    columns = min(10, int(13.0 * 160 / shown))  # dots per inch
    assert red.sum(axis=1).max() == pytest.approx(columns * shown, abs=2 * columns)
    assert red.sum(axis=0).max() == pytest.approx(2 * shown, abs=4)


def test_captions_stand_below_their_images_wrapped_to_their_width(tmp_path):
    images = flat_images((255, 0, 0), (0, 0, 255))
    captions = ["a red square", "a blue square " * 8]
    plot_grid(tmp_path / "short.png", images, ["a", "b"], title="two", below=True)
    plot_grid(tmp_path / "long.png", images, captions, title="two", below=True)
    short, long = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("short", "long"))
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 50
    red = (long[..., :3] == (255, 0, 0)).all(axis=2)
    below = long[np.nonzero(red.any(axis=1))[0].max() + 2 :]
    assert (below < 128).any()  # letters
    assert max(len(line) for line in wrapped("word " * 40, 1.5).split("\n")) <= 25
    assert wrapped("word " * 400, 1.5).endswith("…") and wrapped("", 1.5) == ""


def test_losses_that_a_run_did_not_have_get_no_panel(tmp_path):
    plain = [{"step": record["step"], "loss": record["loss"]} for record in LOG]
    plot_losses(tmp_path / "haste.png", LOG, title="a run", stop=49)
    plot_losses(tmp_path / "plain.png", plain, title="a run")
    assert Image.open(tmp_path / "haste.png").width > 2 * Image.open(tmp_path / "plain.png").width
    for colour in LIGHT.series[:3]:
        assert share(tmp_path / "haste.png", colour) > 0
    assert share(tmp_path / "plain.png", LIGHT.series[1]) == 0


def test_every_method_has_its_line_and_several_seeds_a_band(tmp_path):
    def points(offset):
        return [{"step": s, "fd": 20 / s + offset, "label_accuracy": 0.5} for s in (1, 2, 3)]

    plot_scores(tmp_path / "one.png", {"plain": {0: points(0)}}, title="")
    both = {"plain": {0: points(0), 1: points(5)}, "HASTE": {0: points(1)}}
    plot_scores(tmp_path / "both.png", both, title="", stop=2)
    assert share(tmp_path / "one.png", LIGHT.series[1]) == 0 < share(tmp_path / "both.png", LIGHT.series[1])
    assert pale_blue(tmp_path / "both.png") > 10 * pale_blue(tmp_path / "one.png")


def test_an_advantage_is_taken_seed_by_seed(tmp_path):
    """HASTE is at half of plain's distance for both seeds, though the seeds differ threefold: no band."""

    def points(distance):
        return [{"step": step, "fd": distance / step, "label_accuracy": 0.5} for step in (1, 2, 3)]

    plain = {0: points(10), 1: points(30)}
    halved = {0: points(5), 1: points(15), 2: points(1000)}  # plain has no seed 2 to compare with
    spread = {0: points(5), 1: points(27)}
    for name, haste in (("halved", halved), ("spread", spread)):
        plot_advantage(tmp_path / f"{name}.png", {"HASTE": haste, "plain": plain}, "plain", title="")
    assert pale_blue(tmp_path / "spread.png") > 10 * pale_blue(tmp_path / "halved.png")


@pytest.mark.parametrize("name", ["a $\\frac{$ b", "odd \ud800 bytes", "line\nbreak"])
def test_names_are_shown_as_they_are(tmp_path, name):
    points = [{"step": 1, "fd": 2.0, "label_accuracy": 0.5}]
    plot_scores(tmp_path / "scores.png", {name: {0: points}, "other": {0: points}}, title=name)
    plot_grid(tmp_path / "grid.png", flat_images((0, 0, 0)), [name], title=name)
    plot_step_errors(tmp_path / "errors.png", np.full((3, 2), 1e-3), title=name)


def pale_blue(path) -> float:
    """The share of an image that a band may have: the line's blue over much white. (A line's edge has a little.)"""
    red, _, blue = pixels(path).astype(int).T
    return float(((blue > 240) & (red > 200) & (red < 240)).mean())


def test_smoothing_keeps_length_constants_and_lines():
    assert smooth(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    line = np.arange(200.0)
    assert smooth(line)[10:-10] == pytest.approx(line[10:-10])
    noise = np.random.default_rng(0).standard_normal(1000)
    assert smooth(noise).std() < 0.3 and len(smooth(noise)) == 1000
    assert smooth(np.array([5.0])) == pytest.approx([5.0])


def test_limits_ignore_a_few_extreme_values():
    values = np.concatenate([[1e6], np.linspace(1, 2, 999)])
    low, high = robust_limits(values)
    assert low < 1 and 1.9 < high < 3
    assert robust_limits(np.array([4.0]))[0] < 4.0 < robust_limits(np.array([4.0]))[1]


def test_errors_over_steps_have_a_band_and_a_dot_at_full_steps(tmp_path):
    alike = np.repeat(np.geomspace(1e-4, 1e-2, 10)[:, None], 5, axis=1)
    alike[:2] = 0.0  # equal states have no place on a log scale
    apart = alike * np.array([0.2, 0.5, 1.0, 2.0, 5.0])
    plot_step_errors(tmp_path / "alike.png", alike, title="")
    plot_step_errors(tmp_path / "apart.png", apart, title="", full_steps=[0, 1, 5, 9])
    assert share(tmp_path / "alike.png", LIGHT.series[0]) > 0
    assert share(tmp_path / "alike.png", LIGHT.series[1]) == 0 < share(tmp_path / "apart.png", LIGHT.series[1])
    assert pale_blue(tmp_path / "apart.png") > 10 * pale_blue(tmp_path / "alike.png")


def test_errors_that_are_all_zero_can_be_drawn(tmp_path):
    plot_step_errors(tmp_path / "zero.png", np.zeros((5, 3)), title="", full_steps=[0, 4])
    assert share(tmp_path / "zero.png", LIGHT.background) > 0.5
