"""The geometry and what it refuses."""

from __future__ import annotations

import pytest

from vwn import Geometry


@pytest.mark.parametrize(
    ("hidden_size", "m", "n", "segment", "over_width", "ratio", "whole"),
    [(24, 1, 4, 24, 96, 4.0, True), (24, 2, 3, 12, 36, 1.5, False), (24, 8, 64, 3, 192, 8.0, True)],
)
def test_derived_sizes(hidden_size, m, n, segment, over_width, ratio, whole):
    geometry = Geometry(hidden_size, m, n)
    assert (geometry.segment_size, geometry.over_width, geometry.ratio) == (segment, over_width, ratio)
    assert geometry.is_whole is whole


@pytest.mark.parametrize(("hidden_size", "m", "n", "nearest"), [(24, 7, 8, "6"), (24, 100, 200, "24"), (7, 2, 3, "1")])
def test_m_that_does_not_divide_names_the_values_and_the_nearest(hidden_size, m, n, nearest):
    with pytest.raises(ValueError, match="does not divide") as error:
        Geometry(hidden_size, m, n)
    message = str(error.value)
    assert f"m = {m}" in message
    assert str(hidden_size) in message
    assert message.rstrip(".").endswith(f"is {nearest}")
    assert "\n" not in message


def test_too_few_slots_names_the_values_and_the_nearest():
    with pytest.raises(ValueError, match=r"n = 3 .*m = 4.*nearest: n = 4"):
        Geometry(24, 4, 3)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 0), ("m", -1), ("n", 2.0), ("m", "2"), ("n", True)])
def test_sizes_must_be_positive_integers(field, value):
    sizes = {"hidden_size": 24, "m": 2, "n": 4} | {field: value}
    with pytest.raises(ValueError, match=f"{field} must be a positive integer, got {value!r}"):
        Geometry(**sizes)
