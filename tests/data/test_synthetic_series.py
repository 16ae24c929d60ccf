import numpy as np

from rookery.data.synthetic_series import SyntheticWindows, synthetic_series


def test_a_series_is_a_function_of_its_number():
    windows = SyntheticWindows(50, 96, 24, seed=3)
    some = windows.take(np.array([7, 41, 7]))
    np.testing.assert_array_equal(some[0], some[2])
    assert not np.array_equal(some[0], some[1], equal_nan=True)
    np.testing.assert_array_equal(np.concatenate(list(windows.batches(8)))[41], some[1])


def test_series_are_finite_and_vary_and_some_have_points_missing_from_their_context():
    assert np.isfinite(synthetic_series(200, 300, 0, 0)).all()
    windows = SyntheticWindows(100, 96, 24).take(np.arange(100))
    missing = np.isnan(windows)
    assert missing[:, :96].any(axis=1).sum() == 10
    assert not missing[:, 96:].any()
    assert (np.nanstd(windows, axis=1) > 0).all()
