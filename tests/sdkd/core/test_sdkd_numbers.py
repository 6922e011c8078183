"""The check of numbers: what `value < low` alone lets through."""

import math
import re

import numpy as np
import pytest

from sdkd.core.numbers import SEED, SHARE, Bounds, check_numbers
from sdkd.errors import InputError

RATE = Bounds(above=0.0, below=1.0)


@pytest.mark.parametrize(
    ("bounds", "value", "message"),
    [
        (Bounds(low=0), math.nan, r"^x nan is not finite: give a number of at least 0$"),
        (Bounds(), math.nan, r"^x nan is not finite: give a finite number$"),
        (Bounds(low=0), math.inf, r"x inf is not finite"),
        (Bounds(high=1), -math.inf, r"x -inf is not finite"),
        (Bounds(low=0), np.float32("nan"), r"x nan is not finite"),
        (SHARE, True, r"^x True is not a number: give a number from 0 to 1$"),
        (SHARE, "0.5", r"x '0.5' is not a number"),
        (SHARE, None, r"x None is not a number"),
        (SHARE, [1], r"x \[1\] is not a number"),
        (SHARE, 1.5, r"^x 1.5 is too large: give a number from 0 to 1$"),
        (RATE, 0.0, r"^x 0.0 is too small: give a number above 0.0 and below 1.0$"),
        (RATE, 1, r"x 1 is too large"),
        (Bounds(low=1, whole=True), 2.0, r"^x 2.0 is not a whole number: give a whole number of at least 1$"),
        (SEED, -1, r"x -1 is too small: give a whole number from 0 to 18446744073709551615"),
        (SEED, 2**64, r"x 18446744073709551616 is too large"),
    ],
)
def test_what_is_no_number_within_its_bounds_is_refused(bounds: Bounds, value: object, message: str) -> None:
    assert re.search(message, bounds.problem("x", value))


def test_what_lies_within_its_bounds_is_taken() -> None:
    for bounds, values in ((SHARE, (0, 1, np.float64(0.5))), (SEED, (2**64 - 1, np.int64(3))), (RATE, (1e-9,))):
        assert [bounds.problem("x", value) for value in values] == [""] * len(values)


def test_a_number_of_thousands_of_digits_is_named_in_short() -> None:
    assert SEED.problem("x", 10**5000).startswith("x 2^16609 is too large")


def test_everything_that_is_wrong_is_said_at_once() -> None:
    table = {"guidance_scale": Bounds(low=0), "seed": SEED, "strength": SHARE}
    check_numbers({"guidance_scale": 7.5, "seed": 0, "strength": None, "other": math.nan}, table)
    message = r"^guidance scale nan is not finite: give .*; seed -1 is too small: give .*$"
    with pytest.raises(InputError, match=message):
        check_numbers({"guidance_scale": math.nan, "seed": -1}, table)
