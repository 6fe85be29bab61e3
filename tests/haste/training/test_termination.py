from haste.training.termination import FixedTermination


def test_alignment_holds_while_the_step_is_below_tau():
    rule = FixedTermination(3)
    assert [rule.due(step) for step in range(5)] == [False, False, False, True, True]


def test_it_ends_once_and_for_good_also_after_a_resume():
    rule = FixedTermination(3)
    rule.stopped_at = 3
    assert not rule.due(4)
    resumed = FixedTermination(3)
    resumed.load_state_dict(rule.state_dict())
    assert resumed.stopped_at == 3 and not resumed.due(4)


def test_minus_one_is_never():
    assert not FixedTermination(-1).due(10**9)
