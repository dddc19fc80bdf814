"""The sampler against a slow, obvious float64 search."""

import numpy as np
import pytest
import torch
from helpers.references import covering_radius, farthest_first
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.progress import seconds_left
from patchcore_plugin.coreset.sampler import project
from patchcore_plugin.coreset.tuning import Tuning

TUNINGS = {
    "float32": Tuning(product_dtype=torch.float32),
    "bfloat16": Tuning(product_dtype=torch.bfloat16),
    # so small that all of it occurs on little data: rounds, blocks, leaves, and clusters out of reach
    "many rounds": Tuning(
        product_dtype=torch.bfloat16, block_rows=128, leaf_rows=16, segment_columns=8, padding_columns=16, piece_values=4096,
        min_candidates=96, pruning_centers=4, pruning_batch=1,
    ),
}  # fmt: skip


@pytest.fixture(params=TUNINGS.values(), ids=TUNINGS)
def tuning(request) -> Tuning:
    """The picks are the same whatever the parts of the work are."""
    return request.param


def reference(points: np.ndarray, size: int, start: int) -> tuple[list[int], float]:
    """Picks and covering radius of farthest-first from ``start``."""
    picks, radius = farthest_first(points, points[[start]], size - 1)
    return [start, *picks], radius


def assert_same_picks(points: np.ndarray, size: int, tuning: Tuning | None = None, random_state: int = 0) -> None:
    sampler = GreedyCoreset(size=size, random_state=random_state, progress=False, tuning=tuning)
    picks = sampler.fit(points).tolist()
    expected, radius = reference(points, size, picks[0])
    assert picks == expected
    assert sampler.radius_ == pytest.approx(radius, rel=1e-12)


def clustered(rng, rows, columns, spread=1.0):
    centers = rng.normal(size=(20, columns)) * 10
    return (centers[rng.integers(0, 20, rows)] + spread * rng.normal(size=(rows, columns))).astype(np.float32)


@pytest.mark.parametrize("random_state", [0, 1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(3000, 16), (20_000, 3), (9000, 152)])
def test_random(rows, columns, random_state, tuning):
    points = np.random.default_rng(random_state).normal(size=(rows, columns)).astype(np.float32)
    assert_same_picks(points, rows // 20, tuning, random_state)


def test_clustered(tuning):
    assert_same_picks(clustered(np.random.default_rng(0), 8000, 32), 800, tuning)


def test_tight_clusters_far_from_the_origin(tuning):
    """Where a float32 expansion of the distance has no correct digit left."""
    assert_same_picks(clustered(np.random.default_rng(0), 5000, 16, spread=1e-4) + 1000, 500, tuning)


def test_duplicated(tuning):
    rng = np.random.default_rng(0)
    assert_same_picks(rng.normal(size=(700, 8)).astype(np.float32)[rng.integers(0, 700, 5000)], 600, tuning)


def test_ties_take_the_lowest_index(tuning):
    assert_same_picks(np.random.default_rng(0).integers(0, 4, (4000, 5)).astype(np.float32), 700, tuning)


def test_real_embeddings(real_embeddings, tuning):
    assert_same_picks(real_embeddings, len(real_embeddings) // 10, tuning)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 400),
    columns=st.integers(1, 12),
    size=st.integers(1, 450),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    values=st.sampled_from(["normal", "few", "line", "constant"]),
)
def test_any_shape(seed, rows, columns, size, scale, offset, values, tuning):
    rng = np.random.default_rng(seed)
    points = {
        "normal": lambda: rng.normal(size=(rows, columns)),
        "few": lambda: rng.integers(0, 3, (rows, columns)),
        "line": lambda: rng.normal(size=(rows, 1)) * np.ones(columns),
        "constant": lambda: np.ones((rows, columns)),
    }[values]()
    assert_same_picks((points * scale + offset).astype(np.float32), size, tuning, seed)


def test_duplicates_end_the_search_early(tuning):
    points = np.repeat(np.eye(4, dtype=np.float32), 25, axis=0)
    sampler = GreedyCoreset(size=50, progress=False, tuning=tuning)
    picks = sampler.fit(points)
    assert len(picks) == 4
    assert len(np.unique(points[picks], axis=0)) == 4
    assert sampler.radius_ == 0


def test_more_asked_for_than_there_is(tuning):
    points = np.random.default_rng(0).normal(size=(5, 3))
    assert sorted(GreedyCoreset(size=9, progress=False, tuning=tuning).fit(points).tolist()) == [0, 1, 2, 3, 4]


def test_ratio_keeps_at_least_one():
    assert len(GreedyCoreset(ratio=0.001, progress=False).fit(np.random.default_rng(0).normal(size=(20, 2)))) == 1


def test_same_state_same_picks_other_state_other_start(tuning):
    points = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    first, again, other = (
        GreedyCoreset(size=50, random_state=s, progress=False, tuning=tuning).fit(points).tolist() for s in (7, 7, 8)
    )
    assert first == again
    assert first[0] != other[0]


def test_order_of_rows_does_not_matter(tuning):
    """Training shuffles its images; the bank must not depend on it."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(3000, 12)).astype(np.float32)
    shuffled = points[rng.permutation(len(points))]
    one, other = (rows[GreedyCoreset(size=200, progress=False, tuning=tuning).fit(rows)] for rows in (points, shuffled))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, tuning):
    points = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    picks = GreedyCoreset(size=150, progress=False, tuning=tuning).fit(points).tolist()
    assert picks == reference(points.double().numpy(), 150, picks[0])[0]


def test_not_contiguous(tuning):
    points = np.random.default_rng(0).normal(size=(6, 2000)).astype(np.float32).T
    assert_same_picks(points, 100, tuning)


def test_reduced_matmul_precision_changes_nothing(tuning):
    points = clustered(np.random.default_rng(0), 3000, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same_picks(points, 300, tuning)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_input_is_left_alone():
    points = torch.randn(500, 4)
    before = points.clone()
    GreedyCoreset(size=20, progress=False).fit(points)
    assert torch.equal(points, before)


def test_progress_bar(capsys):
    GreedyCoreset(size=20).fit(np.random.default_rng(0).normal(size=(500, 4)))
    assert "20/20" in capsys.readouterr().out


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), "half", True])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"^ratio must be None or a number in \(0, 1\], got"):
        GreedyCoreset(ratio=ratio)


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match="size must be None or a whole number of at least 1"):
        GreedyCoreset(size=size)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 2, 2)])
def test_no_matrix(shape):
    with pytest.raises(ValueError, match=r"matrix \(N, D\)"):
        GreedyCoreset(progress=False).fit(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    points = np.zeros((10, 3))
    points[4, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        GreedyCoreset(progress=False).fit(points)


def test_too_large_for_float32():
    with pytest.raises(ValueError, match="too large for distances"):
        GreedyCoreset(progress=False).fit(np.random.default_rng(0).normal(size=(50, 3)) * 1e38)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-22, 1e-19, 1e12, 1e25, 1e35])
def test_extreme_scales(scale, tuning):
    """Where squares leave the range of float32, or of its normal numbers."""
    assert_same_picks((np.random.default_rng(0).normal(size=(2000, 20)) * scale).astype(np.float32), 200, tuning)


@pytest.mark.parametrize("scale", [1e-80, 1e-59, 1e-55, 1e30])
def test_extreme_scales_of_float64(scale, tuning):
    assert_same_picks(np.random.default_rng(0).normal(size=(2000, 20)) * scale, 200, tuning)


def test_details_far_smaller_than_the_range(tuning):
    """Rows whose squared differences float32 takes for zero, beside rows that set the scale."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(600, 4)) * 1e-22, np.eye(4), -np.eye(4)]).astype(np.float32)
    assert_same_picks(points[rng.permutation(len(points))], 500, tuning)


def test_picks_go_into_a_computation_with_gradients():
    points = torch.randn(300, 5, requires_grad=True)
    points[GreedyCoreset(size=20, progress=False).fit(points)].sum().backward()
    assert points.grad.sum() == 100


def test_autocast_changes_nothing(tuning):
    points = clustered(np.random.default_rng(0), 3000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_picks(points, 300, tuning)


def test_negative_strides_and_complex_numbers():
    points = np.random.default_rng(0).normal(size=(500, 4))
    assert_same_picks(points[::-1], 30)
    with pytest.raises(ValueError, match="real numbers, got"):
        GreedyCoreset(progress=False).fit(points.astype(complex))


@pytest.mark.parametrize("state", [1.5, -1, "seed", True])
def test_wrong_random_state(state):
    with pytest.raises(ValueError, match="random_state must be None or a whole number"):
        GreedyCoreset(random_state=state)


def test_numpy_integers_are_whole_numbers():
    points = np.random.default_rng(0).normal(size=(50, 4))
    assert len(GreedyCoreset(size=np.int64(7), random_state=np.int32(3), progress=False).fit(points)) == 7


def test_radius_stops_as_soon_as_it_is_reached(tuning):
    points = clustered(np.random.default_rng(0), 3000, 16)
    order, _ = reference(points, 600, GreedyCoreset(size=1, progress=False, tuning=tuning).fit(points)[0])
    radii = [reference(points, k, order[0])[1] for k in (199, 200)]
    sampler = GreedyCoreset(radius=sum(radii) / 2, progress=False, tuning=tuning)
    assert sampler.fit(points).tolist() == order[:200]
    assert sampler.radius_ == pytest.approx(radii[1])


def test_radius_and_size_stop_at_whichever_comes_first(tuning):
    points = np.random.default_rng(0).normal(size=(2000, 8))
    assert len(GreedyCoreset(size=30, radius=0, progress=False, tuning=tuning).fit(points)) == 30
    assert len(GreedyCoreset(size=30, radius=100, progress=False, tuning=tuning).fit(points)) == 1


def test_radius_of_zero_keeps_every_distinct_row(tuning):
    points = np.random.default_rng(0).integers(0, 5, (900, 2))
    sampler = GreedyCoreset(radius=0, progress=False, tuning=tuning)
    assert len(sampler.fit(points)) == 25
    assert sampler.radius_ == 0


def test_radius_whose_square_overflows(tuning):
    assert len(GreedyCoreset(radius=1e200, progress=False, tuning=tuning).fit(np.eye(5))) == 1


@pytest.mark.parametrize("radius", [-1, float("nan"), float("inf"), "wide", True])
def test_radius_out_of_range(radius):
    with pytest.raises(ValueError, match=r"radius must be None or a finite number of at least 0, got .* train once"):
        GreedyCoreset(radius=radius)


def test_ratio_and_size_together():
    with pytest.raises(ValueError, match="give one of them"):
        GreedyCoreset(ratio=0.1, size=5)


def test_time_left_is_that_of_rounds_and_picks():
    rounds = [(picks, 0.5 + 0.01 * picks) for picks in (10, 50, 200, 400)]
    assert seconds_left(rounds, 4000) == pytest.approx(10 * 0.5 + 0.01 * 4000)
    assert seconds_left(rounds[:3], 4000) is None
    assert seconds_left(rounds, 40_000) is None
    assert seconds_left([(100, 2.0)] * 5, 1000) == pytest.approx(20)


def test_projection_is_used_only_where_it_lowers_the_dimension():
    points = torch.from_numpy(clustered(np.random.default_rng(0), 1500, 600))
    seen = project(points, 0.9, 0)
    assert seen.shape == (1500, 181)  # 4 ln(1500) / (0.9^2 / 2 - 0.9^3 / 3), rounded up
    pairs = torch.randint(0, 1500, (2, 4000), generator=torch.Generator().manual_seed(0))
    before, after = ((rows[pairs[0]] - rows[pairs[1]]).square().sum(1) for rows in (points, seen))
    assert ((after - before).abs() <= 0.9 * before).all()
    assert float(after.mean()) == pytest.approx(float(before.mean()), rel=0.1)
    few = points[:, :152]
    assert project(few, 0.9, 0) is few


def test_projected_coreset_covers_almost_as_well(tuning):
    points = clustered(np.random.default_rng(0), 1500, 600)
    exact, rough = (
        GreedyCoreset(size=100, progress=False, tuning=tuning),
        GreedyCoreset(size=100, progress=False, projection=0.5, tuning=tuning),
    )
    exact.fit(points)
    picks = rough.fit(points)
    reached = covering_radius(points, points[picks])
    assert exact.radius_ < reached < 1.3 * exact.radius_
    assert reached - 1e-3 <= rough.radius_ < 1.2 * reached


@pytest.mark.parametrize("projection", [0, 1, -0.5, float("nan"), "rough", True])
def test_projection_out_of_range(projection):
    with pytest.raises(ValueError, match=r"projection must be None or a number in \(0, 1\), got .* leave it out to pick"):
        GreedyCoreset(projection=projection)


def test_projection_and_radius_together():
    with pytest.raises(ValueError, match="leave projection"):
        GreedyCoreset(radius=3, projection=0.5)
