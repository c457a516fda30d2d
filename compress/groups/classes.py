"""Which indices of which tensors must leave together: a union-find over indices, vectorised.

Every index along every axis of a parameter is one number, its id. Operators carry ids along and state that two must
leave together (`unite`), that one must stay (`freeze`), or that values change for the others when one leaves (`mix`, as
in a layer norm). Statements are collected and solved at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass
class Classes:
    """The statements so far."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)
    _pairs: list[tuple[Ids, Ids]] = field(default_factory=list)
    _frozen: list[tuple[Ids, int]] = field(default_factory=list)
    _mixed: list[Ids] = field(default_factory=list)
    _made: list[Ids] = field(default_factory=list)
    _sites: list[Callable[[Ids], bool]] = field(default_factory=list)

    def new(self, *shape: int) -> Ids:
        """Ids of indices not seen before."""
        size = int(np.prod(shape))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def unite(self, one: Ids, other: Ids) -> None:
        """Ids at the same place of two arrays leave together; shapes are broadcast."""
        one, other = np.broadcast_arrays(one, other)
        self._pairs.append((one.ravel(), other.ravel()))

    def freeze(self, ids: Ids, reason: str) -> None:
        """These stay. The reason given first is the one that counts."""
        self.reasons.append(reason)
        self._frozen.append((ids.ravel(), len(self.reasons) - 1))

    def mix(self, ids: Ids) -> None:
        """What is left takes other values when one of these leaves: zeroing it is not the same."""
        self._mixed.append(ids.ravel())

    def make(self, ids: Ids) -> None:
        """These are output channels of a layer: a group is named after them."""
        self._made.append(ids.ravel())

    def decide_later(self, site: Callable[[Ids], bool]) -> None:
        """A choice that needs all statements: `site(labels)` states more and says whether it did."""
        self._sites.append(site)

    def collapse(self, ids: Ids, axes: Sequence[int]) -> Ids:
        """Along `axes` all leave together; -> ids without those axes."""
        moved = np.moveaxis(ids, list(axes), range(len(axes)))
        flat = moved.reshape(-1, *moved.shape[len(axes) :])
        self.unite(flat[1:], flat[:1])
        first: Ids = flat[0]
        return first

    def split(self, ids: Ids) -> None:
        """An axis was read as several: only one of them can lose indices, the same ones at all places of the others.

        Where the operators behind do not say which, it is the last that varies, as in a channel shuffle.
        """

        def site(labels: Ids) -> bool:
            found = labels[ids]
            varying = [a for a in range(found.ndim) if bool((found != found.take([0], a)).any())]
            if len(varying) > 1:
                self.collapse(ids, varying[:-1])
            return len(varying) > 1

        self.decide_later(site)

    def solve(self) -> Ids:
        """Decide what is open and label every id with its class: -> (count,)."""
        labels = self._labels()
        while sum(site(labels) for site in self._sites):  # each is asked
            labels = self._labels()
        return labels

    def frozen(self, labels: Ids) -> dict[int, str]:
        """Label -> why its class stays."""
        found: dict[int, str] = {}
        for ids, reason in self._frozen:
            for label in np.unique(labels[ids]).tolist():
                found.setdefault(label, self.reasons[reason])
        return found

    def mixed(self, labels: Ids) -> Ids:
        """The labels of classes that are mixed."""
        return np.unique(labels[np.concatenate(self._mixed)]) if self._mixed else np.empty(0, np.int64)

    def made(self) -> Ids:
        """The ids that layers make, ascending."""
        return np.unique(np.concatenate(self._made)) if self._made else np.empty(0, np.int64)

    def _labels(self) -> Ids:
        """The least id of each class, by hooking and pointer jumping (Shiloach, Vishkin 1982)."""
        labels = np.arange(self.count)
        if not self._pairs:
            return labels
        one = np.concatenate([a for a, _ in self._pairs])
        other = np.concatenate([b for _, b in self._pairs])
        while True:
            low, high = np.minimum(labels[one], labels[other]), np.maximum(labels[one], labels[other])
            apart = low != high
            if not apart.any():
                return labels
            one, other = one[apart], other[apart]
            np.minimum.at(labels, high[apart], low[apart])
            while bool((labels[labels] != labels).any()):
                labels = labels[labels]
