"""Drift: the monitor against a slow reference, its limits against scipy, and what it says of simulated production."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from patchcore_plugin.bundle import Calibration
from patchcore_plugin.scoring.drift import ALARM_LEVEL, DEFECT_SHARE, DriftMonitor, limit_share_beyond


def calibration_of(scores, means) -> Calibration:
    scores, means = np.sort(scores).tolist(), np.sort(means).tolist()
    return Calibration(false_positive_rate=0.1, scores=scores, peaks=scores, means=means)


def images(rng, count):
    """Scores and distances, which go together as those of real images do."""
    common = rng.normal(size=count)
    return 30 + 2.5 * (0.7 * common + 0.7 * rng.normal(size=count)), 23 + common


def reference(scores, means, stream) -> list[float]:
    """Evidence after each image, bet by bet."""
    bets = []  # event, probability at most, stake, sum of products
    for number, values in enumerate((scores, means)):
        for sign in (1, -1):
            ordered = sorted(sign * value for value in values)
            for share in (0.5, 0.75, 0.9):
                rank = int(np.ceil(share * len(values)))
                limit = beta.ppf(1 - 1e-3 / 12, len(values) + 1 - rank, rank)
                for stake in (0.5, 0.9):
                    p0 = DEFECT_SHARE + (1 - DEFECT_SHARE) * limit
                    bets.append([number, sign, ordered[rank - 1], p0, stake, 0.0])
    found = []
    for image in stream:
        for bet in bets:
            number, sign, quantile, p0, stake, total = bet
            e = 1 + stake * (1 - p0) / p0 if sign * image[number] > quantile else 1 - stake
            bet[-1] = min((1 + total) * e, ALARM_LEVEL * len(bets))
        found.append(sum(bet[-1] for bet in bets) / len(bets))
    return found


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 150), shift=st.sampled_from([0, 1, -2, 50]))
def test_against_a_slow_reference(seed, count, shift):
    rng = np.random.default_rng(seed)
    scores, means = images(rng, count)
    stream = [(score + shift, mean + shift / 2) for score, mean in zip(*images(rng, 60), strict=True)]
    monitor = DriftMonitor(calibration_of(scores, means))
    found = []
    for score, mean in stream:
        monitor.update(score, mean)
        found.append(monitor.evidence)
    np.testing.assert_allclose(found, reference(scores, means, stream), rtol=1e-5)
    np.testing.assert_allclose((monitor.state.score, monitor.state.distance), np.median(stream[-50:], axis=0))


@pytest.mark.parametrize("count", [1, 20, 100, 177, 10_000])
def test_limits_are_those_of_clopper_and_pearson(count):
    for rank in {max(1, count // 2), max(1, int(0.9 * count)), count}:
        expected = beta.ppf(1 - 1e-4, count + 1 - rank, rank)
        assert limit_share_beyond(count, rank, 1e-4) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [30, 100, 177])
@pytest.mark.parametrize("defects", [0, 0.05])
def test_no_alarm_without_drift(count, defects):
    """The calibration is small and fixed, and production has defects: neither is drift."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(calibration_of(*images(rng, count)))
        most = 0.0
        for score, mean in zip(*images(rng, 5000), strict=True):
            bad = 30 * (rng.random() < defects)
            assert not monitor.update(score + bad, mean + bad)
            most = max(most, monitor.evidence)
        assert most < ALARM_LEVEL / 100
        assert not monitor.state.drifted


@pytest.mark.parametrize(
    ("shift", "what"),
    [((7, 0), "scores are larger"), ((-7, 0), "scores are smaller"), ((0, 3), "distances are larger"),
     ((0, -3), "distances are smaller")],
)  # fmt: skip
def test_drift_is_detected_soon_and_ends_when_it_ends(shift, what):
    rng = np.random.default_rng(3)
    monitor = DriftMonitor(calibration_of(*images(rng, 100)))
    for score, mean in zip(*images(rng, 2000), strict=True):
        monitor.update(score, mean)
    alarms = [monitor.update(score + shift[0], mean + shift[1]) for score, mean in zip(*images(rng, 1000), strict=True)]
    assert sum(alarms) == 1, "once, when it begins"
    assert alarms.index(True) < 50
    state = monitor.state
    assert (state.drifted, state.what, state.images) == (True, what, 3000)
    assert state.since is not None
    for score, mean in zip(*images(rng, 100), strict=True):
        monitor.update(score, mean)
    state = monitor.state
    assert (state.drifted, state.what, state.since) == (False, None, None)


def test_before_the_first_image_and_from_many_threads():
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(calibration_of(*images(rng, 100)))
    assert (monitor.state.images, monitor.state.score, monitor.state.drifted) == (0, None, False)
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda _: monitor.update(99.0, 99.0), range(2000)))
    assert monitor.state.images == 2000
    assert sum(started) == 1
