"""Numbers that people and files give: whether one is a number, finite and within its bounds, said in one message.

Comparisons alone do not do it: `nan < 0` is false, `True` is 1, and an option is not the only way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from sdkd.errors import InputError

_LONG = 128  # bits of the longest whole number that is written out


@dataclass(frozen=True)
class Bounds:
    """What a number may be: `low` and `high` belong to it, `above` and `below` do not; None: no limit."""

    low: float | None = None
    high: float | None = None
    whole: bool = False
    above: float | None = None
    below: float | None = None

    def problem(self, name: str, value: object) -> str:
        """What is wrong with a value and what to give instead; empty when nothing is."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return f"{name} {value!r} is not a number: give {self}"
        if self.whole and not isinstance(value, Integral):
            return f"{name} {value} is not a whole number: give {self}"
        number: float = int(value) if isinstance(value, Integral) else float(value)
        if number != number or number in (float("inf"), float("-inf")):
            return f"{name} {number} is not finite: give {self}"
        if (self.low is not None and number < self.low) or (self.above is not None and number <= self.above):
            return f"{name} {_shown(number)} is too small: give {self}"
        if (self.high is not None and number > self.high) or (self.below is not None and number >= self.below):
            return f"{name} {_shown(number)} is too large: give {self}"
        return ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if None not in (self.low, self.high):
            return f"{kind} from {_shown(self.low)} to {_shown(self.high)}"
        limits = (("of at least", self.low), ("above", self.above), ("of at most", self.high), ("below", self.below))
        words = [f"{word} {_shown(limit)}" for word, limit in limits if limit is not None]
        return f"{kind} {' and '.join(words)}" if words else f"a finite {kind.removeprefix('a ')}"


def _shown(number: object) -> str:
    """A number in few characters: Python refuses to write out an int of thousands of digits."""
    if isinstance(number, int) and number.bit_length() > _LONG:
        return f"{'-' if number < 0 else ''}2^{number.bit_length() - 1}"
    return f"{number}"


def check_number(
    name: str, value: object, low: float | None = None, high: float | None = None, *, whole: bool = False
) -> None:
    """InputError, which names value and bounds, for NaN, infinity, what is out of bounds and what is no number.

    A bool and a text are no numbers; a float is no `whole` one, even 2.0.
    """
    if problem := Bounds(low, high, whole).problem(name, value):
        raise InputError(problem)


def check_numbers(values: Mapping[str, object], table: Mapping[str, Bounds]) -> None:
    """InputError, which names everything that is wrong at once; None and names without bounds are left alone."""
    problems = [
        problem
        for name, bounds in table.items()
        if values.get(name) is not None and (problem := bounds.problem(name.replace("_", " "), values[name]))
    ]
    if problems:
        raise InputError("; ".join(problems))


SEED = Bounds(0, 2**64 - 1, whole=True)  # what torch.Generator.manual_seed takes
SHARE = Bounds(0, 1)

# Of images to draw, in options, in Python and in comparisons; sizes in pixels.
DRAWING = {
    "height": Bounds(1, 1 << 15, whole=True),
    "width": Bounds(1, 1 << 15, whole=True),
    "steps": Bounds(1, 10_000, whole=True),
    "guidance_scale": Bounds(0, 1000),
    "image_guidance_scale": Bounds(0, 1000),
    "control_scale": Bounds(-100, 100),
    "seed": SEED,
    "count": Bounds(1, 1_000_000, whole=True),
    "batch": Bounds(1, 4096, whole=True),
    "num_processes": Bounds(1, 1024, whole=True),
    "runs": Bounds(1, 100_000, whole=True),
    "min_seconds": Bounds(0, 86_400),
}
