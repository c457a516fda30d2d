"""Options of a regulariser, refused by name where they are out of range or misspelt."""

from __future__ import annotations

Option = tuple[object, bool, str]  # the value, whether it is allowed, what is allowed


def check(**options: Option) -> None:
    """Raise ValueError for the first option that is not allowed; it names it."""
    for name, (value, is_allowed, allowed) in options.items():
        if not is_allowed:
            raise ValueError(f"{name} = {value!r} is out of range; allowed is {allowed}")


def one_of(value: object, *words: str) -> Option:
    """One of these words, spelt like this."""
    return value, value in words, " or ".join(words)


def above(value: float, least: float = 0.0) -> Option:
    """A number above `least`."""
    return value, value > least, f"a number above {least:g}"


def at_least(value: float, least: float = 0.0) -> Option:
    """A number from `least` on."""
    return value, value >= least, f"{least:g} and more"


def between(value: float) -> Option:
    """Between 0 and 1, neither of them."""
    return value, 0 < value < 1, "a number between 0 and 1"


def whole(value: object, least: int) -> Option:
    """A whole number from `least` on."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value, is_whole and value >= least, f"a whole number from {least} on"  # type: ignore[operator]
