"""What a sensitivity measurement says: frozen values that go to JSON unchanged."""

from __future__ import annotations

from pydantic import BaseModel


class Outcome(BaseModel, frozen=True, extra="forbid"):
    """How a network answers; the metric and the loss only where there are labels or masks."""

    value: float | None = None  # of the metric, percent
    loss: float | None = None  # the task's mean loss
    distortion: float = 0.0  # |outputs - dense outputs| / |dense outputs|, Euclidean, over all images


class Width(Outcome, frozen=True):
    """One group cut to `kept` channels, the nearest to the share `keep`."""

    keep: float
    kept: int


class Curve(BaseModel, frozen=True):
    """One group at every width, the narrowest first."""

    size: int
    widths: tuple[Width, ...]


class Sensitivity(BaseModel, frozen=True):
    """Every free group's curve, and the uncut network's outcome with its batch norms measured on the same images."""

    score: str
    metric: str | None = None  # what `value` is: top1, miou, or what a task of one's own measures; None without labels
    images: int
    calibration_images: int
    dense: Outcome
    groups: dict[str, Curve]
    frozen: dict[str, str]  # group -> why it cannot be cut
