"""How raw scores are read: against anomalib's post-processor and a plain reference, for image scores and pixels alike."""

import math

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from patchcore_plugin.bundle import Scale
from patchcore_plugin.scoring.thresholds import (
    ROUNDING,
    display_values,
    normalize,
    raw_review_threshold,
    raw_threshold,
    verdict,
    verdict_limit,
    without_rounding,
)

numbers = st.floats(0, 100, width=32)
values = st.lists(numbers, min_size=1, max_size=16).map(np.float32)
sensitivities = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.55, 0.8, 1.0])


@st.composite
def scales(draw):
    """Scales whose threshold lies anywhere in or around the range, which may have no length."""
    minimum = draw(numbers)
    maximum = float(np.float32(minimum + draw(st.sampled_from([0.0, 0.5, 30.0]))))
    return Scale(threshold=draw(numbers), minimum=minimum, maximum=maximum, sensitivity=draw(sensitivities))


def post_process(values: np.ndarray, scale: Scale) -> InferenceBatch:
    """Scores, and the same values as a map, read by anomalib."""
    post = PostProcessor(image_sensitivity=scale.sensitivity, pixel_sensitivity=scale.sensitivity)
    state = {"_{}_threshold": scale.threshold, "{}_min": scale.minimum, "{}_max": scale.maximum}
    post.load_state_dict(
        {
            name.format(kind): torch.tensor(math.nan if value is None else value)
            for kind in ("image", "pixel")
            for name, value in state.items()
        }
    )
    scores = torch.from_numpy(values)
    return post(InferenceBatch(pred_score=scores, anomaly_map=scores[None, None]))


def far_from(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Values that neither float32 nor the rounding that counts as a tie puts on the other side of the threshold."""
    limit = scale.threshold + (0.5 - scale.sensitivity) * (scale.maximum - scale.minimum)
    return np.abs(values - limit) > 1e-4 * (1 + abs(limit) + scale.maximum - scale.minimum)


@settings(max_examples=300)
@given(values=values, scale=scales())
def test_normalized_as_anomalib_does(values, scale):
    expected = post_process(values, scale)
    found = normalize(values, scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.pred_score.numpy(), atol=1e-5)
    np.testing.assert_allclose(found, expected.anomaly_map[0, 0].numpy(), atol=1e-5)


@settings(max_examples=300)
@given(values=values, scale=scales())
def test_verdicts_are_anomalibs(values, scale):
    """For every sensitivity, of image scores and of pixels."""
    values = values[far_from(values, scale)]
    assume(len(values))
    expected = post_process(values, scale)
    assert [verdict(score, scale) == "anomalous" for score in values.tolist()] == expected.pred_label.tolist()
    assert (values > verdict_limit(scale)).tolist() == expected.pred_mask[0, 0].tolist()


@given(score=numbers, scale=scales())
def test_raw_threshold_is_where_the_normalized_score_meets_the_sensitivity(score, scale):
    """A plain reference: a score above the raw threshold is one that normalizes above 1 - sensitivity, before clipping."""
    span = scale.maximum - scale.minimum
    assume(span)
    assume(far_from(np.float32([score]), scale)[0])
    normalized = (score - scale.threshold) / span + 0.5
    assert (score > raw_threshold(scale)) == (normalized > 1 - scale.sensitivity)


@pytest.mark.parametrize("sensitivity", [0.2, 0.5, 0.9])
def test_a_score_that_differs_by_rounding_is_not_above(sensitivity):
    scale = Scale(threshold=40, minimum=30, maximum=60, sensitivity=sensitivity)
    limit = raw_threshold(scale)
    assert limit == 40 + 30 * (0.5 - sensitivity)
    assert verdict(limit, scale) == verdict(limit * (1 + 0.9 * ROUNDING), scale) == "normal"
    assert verdict(limit * (1 + 1.1 * ROUNDING), scale) == "anomalous"
    assert without_rounding(limit * (1 + 0.9 * ROUNDING)) < limit < without_rounding(limit * (1 + 1.1 * ROUNDING))


def test_sensitivity_of_0_calls_nothing_anomalous():
    scale = Scale(threshold=40, minimum=30, maximum=60, sensitivity=0)
    assert raw_threshold(scale) == 55
    assert verdict(1e9, scale) == "normal"
    assert post_process(np.float32([1e9]), scale).pred_label.tolist() == [False]


@given(score=numbers, scale=scales(), below=st.floats(0, 100))
def test_review_band(score, scale, below):
    """A plain reference: above the threshold is anomalous, else above the review threshold is review, both moved alike."""
    banded = scale.model_copy(update={"review": scale.threshold - below})
    plain, review = verdict(score, scale), scale.model_copy(update={"threshold": scale.threshold - below})
    expected = "anomalous" if plain == "anomalous" else "review" if verdict(score, review) == "anomalous" else "normal"
    assert verdict(score, banded) == expected
    apart = raw_threshold(banded) - raw_review_threshold(banded)
    assert apart == pytest.approx(below, abs=1e-6 * (1 + abs(scale.threshold)))
    assert verdict_limit(banded) == verdict_limit(scale)


def test_without_range():
    """The threshold is taken as it is, and nothing is normalized."""
    scale = Scale(threshold=40, sensitivity=0.9)
    assert raw_threshold(scale) == 40
    assert (verdict(40.1, scale), verdict(39.9, scale)) == ("anomalous", "normal")
    assert normalize(np.float32([40]), scale) is None
    np.testing.assert_allclose(display_values(np.float32([[0, 10], [20, 40]]), scale), [[0, 0.25], [0.5, 1]])
    assert display_values(np.zeros((2, 2), np.float32), scale).tolist() == [[0, 0], [0, 0]]


def test_without_threshold():
    for scale in (Scale(), Scale(minimum=30, maximum=60)):
        assert raw_threshold(scale) is verdict_limit(scale) is verdict(100, scale) is None
    np.testing.assert_allclose(normalize(np.float32([30, 45, 90]), scale), [0, 0.5, 1])
    np.testing.assert_allclose(post_process(np.float32([30, 45, 90]), scale).pred_score, [0, 0.5, 1])


@given(scale=scales())
def test_shown_with_the_threshold_at_one_half(scale):
    """The threshold with the sensitivity in it, as far as the range reaches."""
    assume(scale.minimum < scale.maximum)
    limit = raw_threshold(scale)
    shown = display_values(np.float32([[limit]]), scale)
    assert float(shown[0, 0]) == pytest.approx(0.5, abs=1e-4)
