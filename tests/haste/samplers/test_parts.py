"""Images made in parts, on Gaussian data whose parts depend on the one before: all is known in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from haste.errors import UserError
from haste.samplers import BOTH, COND, UNCOND, Solver, initial_noise, sample, time_grid

MEAN, STD, FOLLOWS = 0.7, 0.4, 0.5
PARTS, SIZES = 4, (3, 1, 2, 3)  # tokens of each part: they may differ
GROWING = [part / (PARTS - 1) for part in range(PARTS)]


class GaussianEngine:
    """The velocity E[v | x_t] of parts whose numbers are N(m, STD²), with m = MEAN + FOLLOWS · the mean of the part
    before, or of what that one is expected to become if it is in flight; without a label the mean is 0 for MEAN."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[float], tuple[str, ...], list[torch.Tensor]]] = []
        self.finished: list[tuple[int, torch.Tensor, int]] = []  # part, state, after how many calls

    def velocities(self, first, states, times, branches):
        self.calls.append((first, times, branches, [state.clone() for state in states]))
        return [
            torch.cat(parts) for parts in zip(*(self._branch(first, states, times, b) for b in branches), strict=True)
        ]

    def _branch(self, first, states, times, branch):
        before = self.finished[first - 1][1].double() if first else None
        velocities = []
        for x, t in zip(states, times, strict=True):
            mean = MEAN if branch == "cond" else 0.0
            if before is not None:
                mean = mean + FOLLOWS * before.mean((1, 2), keepdim=True)
            centred = (x - (1 - t) * mean) / (((1 - t) * STD) ** 2 + t**2)
            before = mean + (1 - t) * STD**2 * centred
            velocities.append(t * centred - before)
        return velocities

    def finish(self, part, state):
        assert part == len(self.finished)
        self.finished.append((part, state, len(self.calls)))


def noises_for(batch: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [initial_noise((batch, size, 2), generator, dtype=dtype) for size in SIZES]


def run(scales=(0.0,) * PARTS, noises=None, cache=None, **settings):
    engine, solve = GaussianEngine(), Solver(**settings)
    return solve.parts(engine, noises_for(2) if noises is None else noises, scales, cache), engine, solve


def kicks(steps, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        initial_noise((2, size, 2), generator, dtype=torch.float64)
        for size, count in zip(SIZES, steps, strict=True)
        for _ in range(count - 1)
    ]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- one part after the other ----------------------------------------------------------------------------------------


def test_each_part_goes_through_the_shifted_times():
    _, engine, solve = run(num_steps=3, time_shift=3.0)
    expected = time_grid("euler", 3, time_shift=3.0)[:-1].tolist()
    assert [times for _, times, _, _ in engine.calls] == [[time] for time in expected * PARTS]
    assert solve.times((0.0,) * PARTS) == [*expected, 0.0]


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2)])
def test_each_part_reaches_the_flow_given_the_one_before(sampler, order):
    errors = []
    for steps in (40, 80):
        parts, *_ = run(num_steps=steps, sampler=sampler)
        means = [MEAN, *(MEAN + FOLLOWS * part.mean((1, 2), keepdim=True) for part in parts)]
        reached = zip(parts, means[:-1], noises_for(2), strict=True)
        errors.append(max((part - mean - STD * e).abs().max() for part, mean, e in reached))
    assert errors[1] < 0.03
    assert (errors[0] / errors[1]).item() == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama"])
@pytest.mark.parametrize("guidance", ["batched", "separate"])
def test_a_run_is_that_of_each_part_for_itself(sampler, guidance):
    """Part by part by `sample`, guidance and all, to the last bit; the noise of the steps in the public order."""
    steps, noises = [4, 3, 2, 5], noises_for(2)
    settings = {"sampler": sampler, "cfg_scale": 2.5, "null": -1, "guidance": guidance, "guidance_high": 0.9}
    parts, *_ = run(GROWING, noises, part_steps=steps, step_noise=kicks(steps), **settings)
    engine, drawn = GaussianEngine(), iter(kicks(steps))
    for part, (noise, count) in enumerate(zip(noises, steps, strict=True)):

        def model(x, t, y, part=part):
            branches = COND if len(y.unique()) == 1 and y[0] >= 0 else UNCOND if len(y) == 2 else BOTH
            return engine.velocities(part, [x[:2]], [t[0].item()], branches)[0]

        scale = 1 + GROWING[part] * 1.5
        wanted = sample(
            model, noise, torch.zeros(2), step_noise=drawn, num_steps=count, **{**settings, "cfg_scale": scale}
        )
        assert torch.equal(parts[part], wanted)
        engine.finish(part, wanted)
    assert next(drawn, None) is None or sampler != "euler-maruyama"


def test_only_what_is_needed_is_computed():
    """The first part, whose guidance is 1, and steps outside of the interval have no second half."""
    _, engine, solve = run(GROWING, cfg_scale=3.0, null=-1, num_steps=3, guidance_low=0.5)
    assert [branches for _, _, branches, _ in engine.calls] == [COND] * 3 + 3 * [BOTH, BOTH, COND]
    assert [first for first, *_ in engine.calls] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [part for part, *_ in engine.finished] == [0, 1, 2]  # nothing is conditioned on the last
    assert solve.rounds == 12
    _, engine, _ = run(GROWING, cfg_scale=3.0, null=-1, num_steps=2, guidance="separate")
    assert [branches for _, _, branches, _ in engine.calls] == [COND] * 2 + 6 * [COND, UNCOND]


def test_a_part_is_handed_on_in_the_type_of_the_noise():
    parts, engine, _ = run(noises=noises_for(2, torch.float32), num_steps=3)
    assert all(part.dtype == torch.float32 for part in parts)
    assert all(torch.equal(state, part) for (_, state, _), part in zip(engine.finished, parts, strict=False))
    assert all(state.dtype == torch.float64 for *_, states in engine.calls for state in states)


# -- staggered -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
@pytest.mark.parametrize("steps", [(6,) * PARTS, (6, 5, 3, 2), (2, 4, 6, 3)])
def test_staggered_by_all_steps_is_one_after_the_other(sampler, steps):
    settings = {"sampler": sampler, "part_steps": steps, "cfg_scale": 2.0, "null": -1}
    plain, _, one = run(GROWING, step_noise=kicks(steps), **settings)
    staggered, engine, other = run(GROWING, step_noise=kicks(steps), stagger=6, **settings)
    assert same(plain, staggered) and one.rounds == other.rounds == sum(steps) == len(engine.calls)


def test_rounds_and_times_of_staggered_parts():
    for stagger, rounds in ((50, 200), (25, 125), (12, 86), (6, 68), (0, 50)):
        _, engine, solve = run(num_steps=50, stagger=stagger)
        assert solve.rounds == len(engine.calls) == rounds
    _, engine, _ = run(num_steps=4, stagger=2)
    expected = [
        (0, [1.0]), (0, [0.75]), (0, [0.5, 1.0]), (0, [0.25, 0.75]), (1, [0.5, 1.0]), (1, [0.25, 0.75]),
        (2, [0.5, 1.0]), (2, [0.25, 0.75]), (3, [0.5]), (3, [0.25]),
    ]  # fmt: skip
    assert [(first, times) for first, times, *_ in engine.calls] == expected
    assert [(part, calls) for part, _, calls in engine.finished] == [(0, 4), (1, 6), (2, 8)]


def test_a_part_that_is_done_first_waits_for_the_one_before():
    """It stays in flight at t = 0, as it ended; one behind which nothing is left leaves."""
    parts, engine, solve = run(part_steps=(4, 2, 4, 1), stagger=1)
    assert [(first, times) for first, times, *_ in engine.calls] == [
        (0, [1.0]), (0, [0.75, 1.0]), (0, [0.5, 0.5, 1.0]), (0, [0.25, 0.0, 0.75, 1.0]), (2, [0.5]), (2, [0.25]),
    ]  # fmt: skip
    assert torch.equal(engine.calls[3][3][1], parts[1])
    assert [(part, calls) for part, _, calls in engine.finished] == [(0, 4), (1, 4)]


def test_a_round_has_both_halves_if_any_part_in_flight_is_guided():
    settings = {"num_steps": 4, "stagger": 2, "cfg_scale": 2.0, "null": -1}
    parts, engine, _ = run(GROWING, **settings)
    assert [branches for _, _, branches, _ in engine.calls] == [COND] * 2 + [BOTH] * 8
    assert torch.equal(parts[0], run(num_steps=4)[0][0])  # the first part's guidance is 1 all the same


def test_the_noise_of_a_step_does_not_depend_on_the_stagger():
    """Given, or from a generator per image: part by part, step by step."""
    steps, reached = (5, 4, 3, 4), {}
    for stagger in (None, 3, 1, 0):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        _, drawn, _ = run(part_steps=steps, stagger=stagger, sampler="euler-maruyama", generator=generators)
        _, given, _ = run(part_steps=steps, stagger=stagger, sampler="euler-maruyama", step_noise=kicks(steps))
        reached[stagger] = [_kicks_of(engine, steps) for engine in (drawn, given)]
    for stagger in (3, 1, 0):
        for source in (0, 1):
            for part in range(PARTS):
                torch.testing.assert_close(reached[stagger][source][part], reached[None][source][part])
    expected = iter(kicks(steps))
    for part, count in enumerate(steps):
        torch.testing.assert_close(reached[0][1][part], torch.stack([next(expected) for _ in range(count - 1)]))


def _kicks_of(engine, steps) -> list[torch.Tensor]:
    """The noise that was added between the calls of each part, found again from states and velocities."""
    seen: list[list[tuple]] = [[] for _ in steps]
    replayed = GaussianEngine()
    replayed.finished = engine.finished
    for first, times, branches, states in engine.calls:
        velocities = replayed.velocities(first, states, times, branches)
        for offset, (x, t, v) in enumerate(zip(states, times, velocities, strict=True)):
            seen[first + offset].append((x, t, v))
    added = []
    for own in seen:
        own = [call for call in own if call[1] > 0]
        of_part = []
        for (x, t, v), (x_next, t_next, _) in pairwise(own):
            drift = (2 - t) * v + x
            of_part.append((x_next - x - drift * (t_next - t)) / (2 * t * (t - t_next)) ** 0.5)
        added.append(torch.stack(of_part))
    return added


# -- callbacks, bad input --------------------------------------------------------------------------------------------


def test_progress_and_observe_follow_the_rounds():
    told, seen = [], []
    parts, *_ = run(num_steps=4, stagger=2, progress=lambda *at: told.append(at), observe=lambda *at: seen.append(at))
    assert told == [(number + 1, 10) for number in range(10)]
    assert [number for number, _ in seen] == list(range(10))
    assert all(state.shape == (2, sum(SIZES), 2) and state.dtype == torch.float64 for _, state in seen)
    assert torch.equal(seen[-1][1], torch.cat(parts, dim=1))
    assert torch.equal(seen[0][1][:, SIZES[0] :], torch.cat(noises_for(2)[1:], dim=1))  # has not begun


def test_all_times_are_known_beforehand():
    solve = Solver(num_steps=4, part_steps=(4, 2, 4, 1), stagger=1)
    assert solve.times(GROWING) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_an_empty_batch_gives_an_empty_batch():
    parts, *_ = run(GROWING, noises_for(0), num_steps=2, cfg_scale=2.0, null=-1)
    assert [part.shape for part in parts] == [(0, size, 2) for size in SIZES]


def test_a_part_and_its_step_that_give_nan_are_named():
    class Breaks(GaussianEngine):
        def _branch(self, first, states, times, branch):
            broken = float("nan") if first == 2 and times[0] < 0.6 else 1.0
            return [v * broken for v in super()._branch(first, states, times, branch)]

    with pytest.raises(UserError, match=r"step 3 of 4 of part 3 of 4, at t = 0\.5, gave NaN or infinity"):
        Solver(num_steps=4).parts(Breaks(), noises_for(2), GROWING)


@pytest.mark.parametrize(
    "settings, error, named",
    [
        ({"part_steps": (4, 4, 4)}, UserError, "part_steps must have 4 numbers"),
        ({"part_steps": (4, 4, 0, 4)}, UserError, "num_steps must be"),
        ({"sampler": "heun", "stagger": 2}, UserError, "stagger must be None"),
        ({"stagger": -1}, UserError, "stagger must be"),
        ({"stagger": 2.5}, UserError, "stagger must be"),
        ({"cfg_scale": 0.25, "null": -1}, UserError, "cfg_scale must be .* got 0.25"),
        ({"sampler": "ddim"}, UserError, "sampler must be one of"),
        ({"path": "vp"}, UserError, "path must be one of"),
        ({"cfg_scale": 2.0}, UserError, "null must be"),
        ({"guided_channels": 3}, UserError, "guided_channels must be None"),
        ({"sampler": "euler-maruyama", "step_noise": [torch.zeros(2, 3, 2)] * 2}, ValueError, "step_noise must have"),
        ({"sampler": "euler-maruyama", "step_noise": [torch.zeros(2, 1, 2)]}, ValueError, "step_noise must have"),
    ],
)
def test_settings_that_make_no_sense(settings, error, named):
    with pytest.raises(error, match=named):
        run(GROWING, **{"num_steps": 4, **settings})
