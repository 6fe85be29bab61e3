from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from haste.alignment.termination import make_termination
from haste.errors import UserError
from haste.training.config import TrainConfig, resolve


def make_rule(**settings):
    return make_termination(resolve(replace(TrainConfig(exp_name="a"), **settings)))


def run(rule, values=(), start=0, steps=100):
    """The steps at which a trainer would probe, and the step before which it would end alignment (None: never)."""
    values, probes = iter(values), []
    for step in range(start, steps):
        if rule.wants_probe(step):
            probes.append(step)
            rule.observe(step, next(values))
        if rule.due(step):
            rule.stopped_at = step
            return probes, step
        assert rule.weight(step) > 0
    return probes, None


PROBED = {"early_stop_point": -1, "probe_start": 20, "probe_every": 10}
RULES = {
    "fixed": {"early_stop_point": 50},
    "cosine-ramp": {"early_stop_point": 50},
    "gradient-cosine": PROBED,
    "plateau": {**PROBED, "plateau_patience": 2, "plateau_min_delta": 0.05},
}
# Both probed rules end alignment at step 50: as a cosine, -0.06 is too low; as losses, -0.04 and -0.06 are no lower.
VALUES = (0.3, -0.05, -0.04, -0.06, -0.08)


# ---- fixed ----


def test_alignment_holds_with_full_weight_while_the_step_is_below_tau():
    rule = make_rule(early_stop_point=3)
    assert [(rule.weight(step), rule.due(step)) for step in range(3)] == [(1.0, False)] * 3
    assert rule.due(3) and rule.due(4)
    assert rule.reason == "--early-stop-point is 3"


def test_minus_one_is_never():
    assert not make_rule(early_stop_point=-1).due(10**9)


# ---- cosine ramp ----


def test_the_ramp_is_half_a_cosine_from_its_start_to_tau():
    rule = make_rule(termination="cosine-ramp", ramp_start=10, early_stop_point=50)
    assert [rule.weight(step) for step in (0, 9, 10)] == [1.0, 1.0, 1.0]
    for step in range(10, 50):
        assert rule.weight(step) == pytest.approx((1 + math.cos(math.pi * (step - 10) / 40)) / 2, abs=1e-12)
    assert rule.weight(30) == pytest.approx(0.5)
    assert run(rule) == ([], 50)


def test_the_weight_is_above_0_up_to_the_last_step_of_a_long_ramp():
    rule = make_rule(termination="cosine-ramp", early_stop_point=10**9)
    assert 0 < rule.weight(10**9 - 1) < 1e-17


# ---- gradient cosine and plateau ----


def test_the_gradient_cosine_ends_alignment_at_the_first_probe_below_the_threshold():
    rule = make_rule(termination="gradient-cosine", **PROBED)
    assert run(rule, VALUES) == ([20, 30, 40, 50], 50)
    assert rule.reason == "the gradients of alignment and of the loss without it have cosine -0.0600, below -0.05"


def test_the_published_schedule_is_the_default():
    rule = make_rule(termination="gradient-cosine", early_stop_point=-1, model="SiT-B/2", attn_coeff=0.5)
    probes = [step for step in range(100_001) if rule.wants_probe(step)]
    assert probes == [50_000, 60_000, 70_000, 80_000, 90_000, 100_000]
    assert (rule.block, rule.threshold, rule.TIMES) == (4, -0.05, (0.02, 0.1, 0.5, 0.8))


def test_a_plateau_is_so_many_probes_without_a_lower_loss():
    settings = {**PROBED, "termination": "plateau", "plateau_patience": 2, "plateau_min_delta": 0.1}
    falling = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0, -0.2, -0.4]
    assert run(make_rule(**settings), falling)[1] is None
    slow = [1.0, 0.95, 0.85, 0.83, 0.8, 0.7]  # 0.85 is lower by more than 0.1; 0.83 and 0.8 are not lower than that
    rule = make_rule(**settings)
    assert run(rule, slow) == ([20, 30, 40, 50, 60], 60)
    assert rule.reason == "the alignment loss is not below 0.8500 by more than 0.1 after 2 more probes"


@pytest.mark.parametrize("name", ["gradient-cosine", "plateau"])
def test_tau_is_the_latest_step(name):
    rule = make_rule(termination=name, early_stop_point=35, probe_start=20, probe_every=10)
    assert run(rule, [1.0, 0.5]) == ([20, 30], 35)
    assert rule.reason == "--early-stop-point is 35"


# ---- all of them ----


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("cut", [10, 30, 31, 49, 50])
def test_a_resumed_run_ends_alignment_where_an_unbroken_one_does(name, cut):
    unbroken = run(make_rule(termination=name, **RULES[name]), VALUES)
    assert unbroken[1] == 50
    first = make_rule(termination=name, **RULES[name])
    probes, stopped = run(first, VALUES, steps=cut)
    assert stopped is None
    resumed = make_rule(termination=name, **RULES[name])
    resumed.load_state_dict(first.state_dict())
    assert run(resumed, VALUES[len(probes) :], start=cut) == (unbroken[0][len(probes) :], 50)


@pytest.mark.parametrize("name", RULES)
def test_it_ends_once_and_for_good_also_after_a_resume(name):
    rule = make_rule(termination=name, **RULES[name])
    run(rule, VALUES)
    resumed = make_rule(termination=name, **RULES[name])
    resumed.load_state_dict(rule.state_dict())
    for again in (rule, resumed):
        assert again.stopped_at == 50 and again.reason == rule.reason
        assert not any(again.due(step) or again.wants_probe(step) for step in range(50, 200))


@pytest.mark.parametrize(
    ("settings", "block"),
    [
        ({}, 3),
        ({"probe_block": 7}, 7),  # which the attention reaches, though not the features
        ({"probe_block": 1}, 1),
        ({"proj_coeff": 0.0}, 7),
    ],
)
def test_the_block_of_the_gradients_is_one_that_alignment_reaches(settings, block):
    rule = make_rule(termination="gradient-cosine", attn_coeff=0.5, encoder_depth=3, layer_map="2:7,6:9", **settings)
    assert rule.block == block - 1


@pytest.mark.parametrize("name", RULES)
def test_without_a_teacher_no_rule_asks_for_anything(name):
    rule = make_rule(termination=name, enc_type="None", attn_coeff=0.5, layer_map="no map", encoder_depth=99)
    assert run(rule) == ([], None)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("fixed", "until step 50"),
        ("cosine-ramp", "with weights that fall from step 0 to 0 at step 50"),
        ("gradient-cosine", "until the gradients' cosine is below -0.05, or to the end"),
        ("plateau", "until its loss has not fallen for 2 probes, or to the end"),
    ],
)
def test_the_plan_says_when_it_ends(name, plan):
    assert re.fullmatch(plan, make_rule(termination=name, **RULES[name]).plan)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"termination": "someday"}, "termination must be .*'fixed', .*'someday'"),
        ({"termination": "cosine-ramp", "early_stop_point": -1}, "--early-stop-point must be a step .* got -1"),
        (
            {"termination": "cosine-ramp", "ramp_start": 9, "early_stop_point": 9},
            "--ramp-start must be .* below .* 9, got 9",
        ),
        ({"termination": "gradient-cosine", "probe_block": 9}, "--probe-block must be 1 to 8, .* got 9"),
    ],
)
def test_settings_with_which_a_rule_cannot_work_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make_rule(**settings)
