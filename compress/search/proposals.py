"""Which trial is next: a geometric ladder to the edge of the budget, each choice once there, then a Gaussian process.

Accuracy falls nearly monotonically with the share that is kept, so that a ladder finds the edge in a handful of runs,
where a sampler that knows nothing spends as many on its start. All of it is a function of the finished trials and the
seed: a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from compress.search.record import distributions, frozen, quiet
from compress.search.settings import Outcome, Search, fits
from compress.search.space import Space

FIRST = 0.5  # share that the ladder begins with: the recipe's own default
STEP = 2.0  # downwards by halves, upwards by square roots
CLOSE = 1.25  # ratio of the shares on both sides of the edge at which limits are tried, if there are any
CLOSEST = 1.05  # and at which the search ends, if there are none
LESS = 0.9  # of the best share: where other limits are first tried (ours)
LEAST = 0.6  # and the least that is tried near the edge
NEAR = 3.0  # ratio to the best share within which trials tell about the edge
GAIN = 0.97  # of the best share: a proposal above it is not worth a run


def propose(done: Sequence[Outcome], space: Space, wanted: Search, *, seed: int) -> dict[str, Any] | None:
    """What the next trial tries, or None where no further one is worth its cost."""
    found = best(done, wanted)
    if found is None:
        keep = _up(done, space)
        return None if keep is None else {"keep": keep, **space.base}
    low, high = edge(done, found, space)
    ratio = high / low
    if low == space.keep[0] and all(fits(outcome, wanted) for outcome in done):
        if ratio > CLOSEST:
            return {**found.params, "keep": max(low, high / STEP)}
        return None  # as small as it gets
    if ratio > (CLOSE if space.has_limits else CLOSEST):
        return {**found.params, "keep": math.sqrt(low * high)}
    if not space.has_limits:
        return None
    for name, values in space.choices.items():
        for value in values:
            if all(outcome.params[name] != value for outcome in done):
                return {**found.params, name: value, "keep": max(space.keep[0], high * LESS)}
    return _sampled(done, space, wanted, high=high, seed=seed)


def best(done: Sequence[Outcome], wanted: Search) -> Outcome | None:
    """The smallest network within the budget; of equally small ones the most accurate."""
    within = [outcome for outcome in done if fits(outcome, wanted)]
    return min(within, key=lambda o: (o.reached or o.keep, -(o.val or 0.0), o.number), default=None)


def edge(done: Sequence[Outcome], found: Outcome, space: Space) -> tuple[float, float]:
    """The largest share below the best one's that did not fit, and the best one's.

    Where none did below it the lowest there is; or, where the best one's limits have taken it past those that failed
    with others, a share not far below it.
    """
    high = found.reached or found.keep
    failed = [o.keep for o in done if o.keep < high and o.number != found.number]
    is_past = not failed and any(found.params.items() - o.params.items() - {("keep", found.keep)} for o in done)
    return max([space.keep[0], high * LEAST if is_past else 0.0, *failed]), high


def ladder(space: Space) -> list[float]:
    """The shares that would be tried if all of them fitted."""
    shares = [min(max(FIRST, space.keep[0]), space.keep[1])]
    while shares[-1] / space.keep[0] > CLOSEST:
        shares.append(max(space.keep[0], shares[-1] / STEP))
    return shares


def _up(done: Sequence[Outcome], space: Space) -> float | None:
    """The next share where nothing has fitted yet; None past the highest one."""
    if not done:
        return ladder(space)[0]
    tried = max(outcome.keep for outcome in done)
    if tried >= space.keep[1]:
        return None
    return min(math.sqrt(tried), space.keep[1])


def _sampled(done: Sequence[Outcome], space: Space, wanted: Search, *, high: float, seed: int) -> dict[str, Any] | None:
    """A point where a Gaussian process expects a smaller network within the budget, below the best share so far.

    Optuna's GPSampler with the drop as its constraint (log expected improvement times the probability of fitting), on
    the trials near the edge alone: far from it the drop is another function. That less is less accurate it does not
    know: a share at or below one that failed with the same choices, or so close to the best one that nothing is
    gained, is moved half way between the two. None: the two have met.
    """
    import optuna

    near = (max(space.keep[0], high / NEAR), min(space.keep[1], high * NEAR))
    local = space.model_copy(update={"keep": near})
    known = [outcome for outcome in done if outcome.drop is not None and near[0] <= outcome.keep <= near[1]]
    sampler = optuna.samplers.GPSampler(seed=seed * 1000 + len(done), n_startup_trials=0)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its fits: how far an optimiser came
        study = optuna.create_study(sampler=sampler)
        for outcome in known:
            study.add_trial(frozen(outcome, local, wanted))
        params = dict(study.ask(distributions(local)).params)
    alike = [o.keep for o in done if all(o.params[name] == params[name] for name in space.choices)]
    failed = max([space.keep[0], high * LEAST, *(keep for keep in alike if keep < high)])
    if not failed < params["keep"] <= high * GAIN:
        params["keep"] = math.sqrt(failed * high)
    return params if failed <= high * GAIN else None
