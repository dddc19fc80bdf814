"""Conformal p-values and thresholds: against slow references, and the promise itself by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.bundle import MAX_CALIBRATION, Calibration
from patchcore_plugin.scoring.conformal import extend_calibration, images_needed, p_value, set_thresholds, threshold
from patchcore_plugin.scoring.thresholds import normalize

# few different values, so that ties are common
scores = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=40)
rates = st.sampled_from([0.01, 0.05, 0.07, 0.1, 0.2, 0.25, 0.3, 0.5, 0.9])


@given(calibration=scores, score=st.integers(-1, 13).map(float))
def test_p_value(calibration, score):
    at_least = sum(other >= score for other in [*calibration, score])
    assert p_value(sorted(calibration), score) == at_least / (len(calibration) + 1)


@settings(max_examples=300)
@given(calibration=scores, rate=rates)
def test_threshold(calibration, rate):
    """The ceil((n + 1) (1 - rate))-th smallest, in exact arithmetic; scores above it have a p-value of at most the rate."""
    exact, ordered = Fraction(str(rate)), sorted(calibration)
    rank = math.ceil((len(calibration) + 1) * (1 - exact))
    if rank > len(calibration):
        with pytest.raises(ValueError, match=f"at least {math.ceil(1 / exact) - 1} normal images, got {len(calibration)}"):
            threshold(ordered, rate)
        return
    found = threshold(ordered, rate)
    assert found == ordered[rank - 1]
    for score in np.arange(-0.5, 13, 0.5):
        at_least = sum(other >= score for other in calibration)
        assert (score > found) == (Fraction(1 + at_least, len(calibration) + 1) <= exact)


def test_fewest_images():
    for rate, needed in {0.01: 99, 0.05: 19, 0.1: 9, 0.5: 1, 0.3: 3, 0.001: 999}.items():
        assert images_needed(rate) == needed
        assert threshold(list(range(needed)), rate) == needed - 1
    for rate in (0, 1, -0.1, math.nan, 1.5):
        with pytest.raises(ValueError, match=rf"in \(0, 1\), got {rate}"):
            images_needed(rate)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("count", [99, 150])
def test_promise(count, rate):
    """Over many draws of calibration images, the mean rate of false alarms is floor((n + 1) rate) / (n + 1)."""
    rng, draws = np.random.default_rng(7), 4000
    rates = []
    for _ in range(draws):
        calibration = np.sort(rng.gamma(2, size=count))
        rates.append(np.mean(rng.gamma(2, size=200) > threshold(calibration, rate)))
    expected = math.floor((count + 1) * Fraction(str(rate))) / (count + 1)
    error = np.std(rates) / math.sqrt(draws)
    assert expected <= rate
    assert np.mean(rates) == pytest.approx(expected, abs=4 * error)


@given(scores=st.lists(st.floats(1, 100), min_size=9, max_size=30), rate=st.sampled_from([0.1, 0.25, 0.5]))
def test_normalization_follows_the_thresholds(scores, rate):
    """Normalized scores: 0 at the smallest, 0.5 at the threshold, 1 as far above; also where all scores are the same."""
    scores = sorted(scores)
    means = [score / 2 for score in scores]
    calibration = Calibration(false_positive_rate=rate, scores=scores, peaks=scores, means=means)
    image, pixel = set_thresholds(calibration)
    assert image.threshold == pixel.threshold == threshold(scores, rate)
    reach = image.threshold - scores[0]
    wanted = [0, 0.5, 1] if reach > 1e-3 * image.threshold else [None, 0.5, None]
    values = np.float32([scores[0], image.threshold, image.threshold + reach])
    found = normalize(values, image)
    for one, expected in zip(found, wanted, strict=True):
        assert expected is None or one == pytest.approx(expected, abs=1e-3)
    assert pixel.minimum == means[0]
    assert normalize(np.float32([1000.0]), pixel) == 1


def test_extended_calibration_keeps_to_the_limit():
    full = [float(number) for number in range(MAX_CALIBRATION)]
    calibration = Calibration(false_positive_rate=0.01, scores=full, peaks=full, means=full)
    more = extend_calibration(calibration, [-1.0] * 5000, [-1.0] * 5000, [-1.0] * 5000)
    assert len(more.scores) == MAX_CALIBRATION
    assert 0.3 < np.mean(np.array(more.scores) == -1) < 0.37, "drawn at random of old and new"
