"""Learning rates: NeMo's at every step of its goldens, jasr's own at their turning points."""

import json
import pathlib

import numpy as np
import pytest

from jasr.training import schedules
from jasr.training.optim import OptimConfig

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "nemo" / "optim"
CASES = json.loads((GOLDENS / "lr_schedules.json").read_text(encoding="utf-8"))


def rates(steps, total_steps=100, **fields):
    rate = schedules.make(OptimConfig(**fields), total_steps)
    return np.asarray(rate(np.asarray(steps)))


# ---- NeMo's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_nemo_schedules_have_its_values_at_every_step(case):
    sched = dict(CASES[case])
    lr, sched["name"] = sched.pop("lr"), sched.pop("cls")
    fields = schedules.from_nemo(sched, total_steps=60)
    want = np.load(GOLDENS / "lr_schedules.npz")[case]
    got = rates(np.arange(len(want)), lr=lr, **fields)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


def test_a_step_in_a_run_is_the_same_as_one_alone():
    fields = dict(schedule="CosineAnnealing", lr=3e-4, warmup_steps=10, decay_steps=60)
    np.testing.assert_allclose(
        [rates(s, **fields) for s in (0, 10, 35, 61)], rates([0, 10, 35, 61], **fields), rtol=1e-6
    )


def test_warmup_policies_hold_the_peak_and_end_at_min_lr():
    fields = dict(lr=2.0, min_lr=0.5, warmup_steps=3, decay_steps=10)
    for name in ("WarmupPolicy", "WarmupHoldPolicy"):
        got = rates([0, 1, 3, 4, 10, 11], schedule=name, **fields)
        np.testing.assert_allclose(got, [0.5, 1.0, 2.0, 2.0, 2.0, 0.5])
    got = rates([0, 50, 99, 101], schedule="WarmupPolicy", lr=1.0)
    np.testing.assert_allclose(got, [1, 1, 1, 0])


def test_polynomial_with_hold_falls_after_the_hold():
    fields = dict(schedule="PolynomialHoldDecayAnnealing", lr=1.0, power=2.0)
    got = rates([4, 9, 10, 14, 15, 20], hold_steps=5, warmup_steps=5, decay_steps=20, **fields)
    np.testing.assert_allclose(got, [5 / 6, 1, 1, 0.36, 0.25, 0], atol=1e-7)


def test_noam_hold_without_hold_is_noam_with_its_peak_given():
    got = rates([9, 10, 40, 90], schedule="NoamHoldAnnealing", lr=1.0, warmup_steps=10)
    np.testing.assert_allclose(got, [10 / 11, 1.0, 0.5, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(schedule="NoamAnnealing"), "d_model"),
        (dict(schedule="NoamHoldAnnealing"), "warmup_steps"),
        (dict(schedule="CosineAnnealing", warmup_steps=60, constant_steps=40), "constant_steps"),
        (dict(schedule="WarmupHoldPolicy", warmup_steps=60, hold_steps=40), "hold_steps"),
        (dict(schedule="CosineAnnealing", hold_steps=4), "hold_steps is for NoamHold"),
        (dict(schedule="cosine", constant_steps=4), "constant_steps is for CosineAnnealing"),
        (dict(schedule="CosineAnnealing", lr=1e-3, min_lr=1e-2), "below min_lr"),
        (dict(schedule="CosineAnealing"), "one of 'cosine'.*'CosineAnnealing'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(fields, told):
    with pytest.raises(ValueError, match=told):
        rates(0, **fields)


def test_nemo_sections_become_settings():
    sched = dict(name="NoamHoldAnnealing", warmup_ratio=0.1, hold_ratio=0.25, monitor="val_loss",
                 max_steps=-1, decay_rate=1.0, warmup_steps=None, last_epoch=-1)  # fmt: skip
    assert schedules.from_nemo(sched, 1000) == dict(
        schedule="NoamHoldAnnealing", decay_steps=1000, min_lr=0.0, warmup_steps=100,
        hold_steps=250, decay_rate=1.0,
    )  # fmt: skip
    assert schedules.from_nemo(dict(name="SquareAnnealing", max_steps=7), 10) == dict(
        schedule="SquareAnnealing", decay_steps=7, min_lr=1e-5
    )


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(name="StepLR"), "StepLR"),
        (dict(cycle=True), "cycle"),
        (dict(gamma=0.1), "gamma"),
        (dict(warmup_steps=3, warmup_ratio=0.1), "both warmup_steps and warmup_ratio"),
    ],
)
def test_nemo_sections_that_are_not_reproduced_are_refused(more, told):
    with pytest.raises(ValueError, match=told):
        schedules.from_nemo(dict(name="PolynomialDecayAnnealing", max_steps=9) | more, 10)


# ---- jasr's own ----------------------------------------------------------------------------------


def test_warmup_reaches_the_peak_and_cosine_ends_at_min_lr():
    fields = dict(lr=2.0, warmup_steps=10, min_lr=0.5)
    np.testing.assert_allclose(rates([0, 4, 9, 10], **fields), [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates([55, 100, 500], **fields), [1.25, 0.5, 0.5], rtol=1e-6)


def test_linear_falls_in_a_line_and_decay_steps_replace_the_total():
    got = rates([0, 25, 50], schedule="linear", lr=1.0, decay_steps=50)
    np.testing.assert_allclose(got, [1.0, 0.5, 0.0], atol=1e-6)


def test_noam_falls_with_the_square_root_after_its_peak():
    got = rates([1, 3, 15], schedule="noam", lr=1.0, warmup_steps=4)
    np.testing.assert_allclose(got, [0.5, 1.0, 0.5], rtol=1e-6)


def test_warmup_longer_than_the_decay_is_refused():
    with pytest.raises(ValueError, match="warmup_steps"):
        rates(0, warmup_steps=100)
    with pytest.raises(ValueError, match="schedule"):
        rates(0, schedule="cosin")
