"""Numbers of events as recordings hold them: what they have to be before they become steps and features."""

from __future__ import annotations

import numpy as np

from ..core.errors import InputError

_LAST = np.int64(2**63 - 1)  # microseconds


def whole(values: np.ndarray, bound: int, what: str) -> np.ndarray:
    """Check that values are whole numbers, 0 <= value < ``bound``. Integer arrays are returned as they are.

    Raises:
        InputError: NaN, fractions, other dtypes, or values outside; ``what`` names them.

    Example:
        >>> whole(np.array([0.0, 3.0]), 4, "x")
        array([0, 3])
    """
    if values.ndim != 1 or values.dtype.kind not in "iufb":
        raise InputError(f"{what} is {values.dtype} {values.shape}, expected one number for each event.")
    if not len(values):
        return values.astype(np.int64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high < bound):  # also NaN
        raise InputError(f"{what} {low}…{high}, expected 0…{bound - 1}.")
    if values.dtype.kind == "f":
        numbers = values.astype(np.int64)
        if not np.array_equal(numbers, values):
            raise InputError(f"{what} has fractions, expected whole numbers 0…{bound - 1}.")
        return numbers
    return values


def microseconds(times: np.ndarray, unit: int, what: str) -> np.ndarray:
    """Times in units of ``unit`` µs as whole µs, int64, rounded down.

    Raises:
        InputError: NaN or infinite times, negative ones, and those that int64 cannot count; ``what`` names whose.

    Example:
        >>> microseconds(np.array([0.5, 2.0]), 1000, "a")
        array([ 500, 2000])
    """
    if times.ndim != 1 or times.dtype.kind not in "iuf":
        raise InputError(
            f"{what} has times of {times.dtype} {times.shape}, expected one number for each event."
        )
    if not len(times):
        return times.astype(np.int64)
    low, high = times.min(), times.max()
    if not low >= 0:  # also NaN
        raise InputError(f"{what} has an event at {low * unit} µs, before its beginning.")
    if not float(high) * unit < float(_LAST):
        raise InputError(f"{what} has an event at {float(high) * unit:g} µs, later than 64 bits can count.")
    if times.dtype.kind == "f":
        return np.floor(times.astype(np.float64) * unit).astype(np.int64)
    return times.astype(np.int64) * unit
