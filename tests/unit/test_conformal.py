"""Conformal p-values and thresholds: against slow references, and the promise itself by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.bundle import MAX_CALIBRATION, Calibration, Sessions
from patchcore_plugin.errors import UsageError
from patchcore_plugin.scoring.conformal import (
    check_review_rate,
    describe_promise,
    extend_calibration,
    image_p_value,
    images_needed,
    p_value,
    set_thresholds,
    threshold,
)
from patchcore_plugin.scoring.thresholds import normalize, verdict

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


@given(
    values=scores.filter(lambda values: len(values) >= 9),
    score=st.integers(-1, 13).map(float),
    pair=st.sampled_from([(0.1, 0.2), (0.1, 0.3), (0.2, 0.5), (0.3, 0.9)]),
)
def test_review_band(values, score, pair):
    """Each promise by itself: p-values up to the first rate are anomalous, and up to the second not normal."""
    rate, review_rate = pair
    ordered = sorted(values)
    calibration = Calibration(
        false_positive_rate=rate, review_rate=review_rate, scores=ordered, peaks=ordered, means=ordered
    )
    image, pixel = set_thresholds(calibration)
    p = Fraction(sum(other >= score for other in [*values, score]), len(values) + 1)
    found = verdict(score, image)
    assert (found == "anomalous") == (p <= Fraction(str(rate)))
    assert (found != "normal") == (p <= Fraction(str(review_rate)))
    assert pixel.threshold == image.review == threshold(ordered, review_rate)
    assert pixel.review is None
    grown = extend_calibration(calibration, [score], [score], [score])
    assert (grown.false_positive_rate, grown.review_rate) == pair


def test_review_band_of_sessions():
    """Both thresholds are the largest that a session gives."""
    values = [float(value) for value in range(20)]
    sessions = Sessions(scores=[0, 1] * 10, peaks=[0, 1] * 10)
    calibration = Calibration(
        false_positive_rate=0.1, review_rate=0.3, scores=values, peaks=values, means=values, sessions=sessions
    )
    image, pixel = set_thresholds(calibration)
    assert (image.threshold, image.review, pixel.threshold) == (19, 15, 15)


@pytest.mark.parametrize(
    ("count", "rates", "sessions", "expected"),
    [
        (99, (0.01, 0.05), 0, "Of 100 good parts, 1 would be stopped, and 4 more looked at, on average."),
        (149, (0.01, None), 0, "Of 100 good parts, 0.667 would be stopped, on average."),
        (30, (0.1, 0.2), 3, "In at least 3 of 4 new sessions, of 100 good parts at most 10 would be stopped, and at most 20 "
         "be stopped or looked at."),
    ],
)  # fmt: skip
def test_promise_in_words(count, rates, sessions, expected):
    values, numbers = [float(value) for value in range(count)], [number % max(sessions, 1) for number in range(count)]
    calibration = Calibration(
        false_positive_rate=rates[0], review_rate=rates[1], scores=values, peaks=values, means=values,
        sessions=Sessions(scores=numbers, peaks=numbers) if sessions else None,
    )  # fmt: skip
    assert describe_promise(calibration) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [(0.05, "review_rate must be above false_positive_rate, 0.05, got 0.05: it is"), (0.01, "above false_positive_rate"),
     (1, r"review_rate must be a number in \(0, 1\), got 1"), ("0.1", "got '0.1'"),
     (math.nan, "got nan"), (True, "got True")],
)  # fmt: skip
def test_review_rate_that_cannot_be(value, reason):
    check_review_rate(None, 0.05)
    check_review_rate(0.06, 0.05)
    with pytest.raises(UsageError, match=reason):
        check_review_rate(value, 0.05)


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


def of_sessions(parts, rate):
    """The calibration of sessions with these scores; each peak is 100 less the score, so that their order differs."""
    values = [(score, number) for number, part in enumerate(parts) for score in part]
    by_score, by_peak = sorted(values), sorted((100 - score, number) for score, number in values)
    (scores, score_sessions), (peaks, peak_sessions) = (map(list, zip(*pairs, strict=True)) for pairs in (by_score, by_peak))
    sessions = Sessions(scores=score_sessions, peaks=peak_sessions)
    return Calibration(false_positive_rate=rate, scores=scores, peaks=peaks, means=[0.0] * len(scores), sessions=sessions)


@given(
    parts=st.lists(st.lists(st.integers(0, 12).map(float), min_size=3, max_size=15), min_size=1, max_size=5),
    score=st.integers(-1, 13).map(float),
    rate=st.sampled_from([0.25, 0.3, 0.5]),
)
def test_sessions(parts, score, rate):
    """Each session's own threshold and p-value, and the largest of them; a score is above exactly if it is rare enough."""
    calibration = of_sessions(parts, rate)
    image, pixel = set_thresholds(calibration)
    assert image.threshold == max(threshold(sorted(part), rate) for part in parts)
    assert pixel.threshold == max(threshold(sorted(100 - value for value in part), rate) for part in parts)
    found = image_p_value(calibration, score)
    assert found == max((1 + sum(value >= score for value in part)) / (len(part) + 1) for part in parts)
    assert (score > image.threshold) == (found <= rate)


@pytest.mark.parametrize("sessions", [1, 2, 5])
def test_promise_for_a_new_session(sessions):
    """Sessions differ more than their images: J of J + 1 new ones keep the rate, which images taken as one do not."""
    rng, draws, images, rate = np.random.default_rng(5), 2000, 40, 0.1
    kept, pooled, alarms = 0, 0, []
    for _ in range(draws):
        shift = rng.gamma(1, size=(sessions + 1, 1))
        scores = shift + rng.gamma(2, size=(sessions + 1, images)) * rng.uniform(0.1, 0.3, (sessions + 1, 1))
        new = scores[-1]
        limit = set_thresholds(of_sessions(scores[:-1].tolist(), rate))[0].threshold
        kept += np.mean(new > limit) <= rate
        alarms.append(np.mean(new > limit))
        pooled += np.mean(new > threshold(np.sort(scores[:-1].ravel()), rate)) <= rate
    promised = sessions / (sessions + 1)
    error = 4 * math.sqrt(promised * (1 - promised) / draws)
    assert kept / draws > promised - error
    assert kept / draws < promised + 0.05 + error, "and little more: the promise is no looser than it need be"
    assert np.mean(alarms) < rate + 1 / (sessions + 1)
    assert sessions == 1 or pooled < kept


def test_extended_by_a_new_session():
    """New images are one more session, if they are enough; of too many, each session keeps its part."""
    old = of_sessions([[1.0, 2.0, 3.0], [5.0, 4.0, 6.0]], 0.25)
    new = extend_calibration(old, [9.0, 0.0, 7.0], [98.0, 99.5, 94.5], [1.0, 1.0, 1.0])
    assert new.scores == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert new.sessions.scores == [2, 0, 0, 0, 1, 1, 1, 2, 2]
    assert new.peaks == [94, 94.5, 95, 96, 97, 98, 98, 99, 99.5]
    assert new.sessions.peaks == [1, 2, 1, 1, 0, 0, 2, 0, 2]
    with pytest.raises(UsageError, match=r"at least 3 normal images of each session .* the new images held out has 2"):
        extend_calibration(old, [9.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    many = [float(number) for number in range(MAX_CALIBRATION)]
    thinned = extend_calibration(old, many, many, many)
    assert [thinned.sessions.scores.count(number) for number in range(3)] == [3, 3, MAX_CALIBRATION // 3]
    assert [thinned.sessions.peaks.count(number) for number in range(3)] == [3, 3, MAX_CALIBRATION // 3]
    assert len(thinned.means) == len(thinned.scores)
    with pytest.raises(UsageError, match="hold back 2 sessions at most, not 3"):
        extend_calibration(of_sessions([[1.0] * 5000, [2.0] * 5000], 1 / 5000), many, many, many)
