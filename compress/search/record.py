"""A search as Optuna keeps it: one journal file in the run folder, which survives a kill and which its tools read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.search.settings import Outcome, Search
from compress.search.space import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

NAME = "search"  # of the study
CONSTRAINT = "drop"
UNKNOWN = 100.0  # points that a trial without a figure is taken to lose


class Journal:
    """The trials of a search. One process at a time: whoever holds the run folder's lock."""

    def __init__(self, path: Path) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # Optuna's, left by a kill
        drop_half_line(path)
        with quiet():
            storage = JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(study_name=NAME, storage=storage, load_if_exists=True)

    def done(self) -> list[Outcome]:
        """The trials that have ended, in their order."""
        found = (trial.user_attrs.get("outcome") for trial in self._study.get_trials(deepcopy=False))
        return [Outcome.model_validate(outcome) for outcome in found if outcome is not None]

    def begun(self) -> tuple[int, dict[str, Any]] | None:
        """Number and parameters of the trial that a killed search was at."""
        running = self._running()
        return None if running is None else (running.number, dict(running.params))

    def begin(self, params: Mapping[str, Any], space: Space) -> int:
        """Note a trial that is about to run. Returns: its number."""
        with quiet():
            self._study.enqueue_trial(dict(params))
            return int(self._study.ask(distributions(space)).number)

    def end(self, outcome: Outcome, wanted: Search) -> None:
        """Note what came of the trial that runs."""
        import optuna

        running = self._running()
        assert running is not None and running.number == outcome.number, outcome.number
        trial = optuna.trial.Trial(self._study, running._trial_id)
        if CONSTRAINT not in running.constraints:  # a kill may have come right here before
            trial.set_constraint(CONSTRAINT, excess(outcome, wanted))
        trial.set_user_attr("outcome", outcome.model_dump(mode="json"))
        with quiet():
            self._study.tell(outcome.number, outcome.reached or outcome.keep)

    def _running(self) -> FrozenTrial | None:
        from optuna.trial import TrialState

        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return found[0] if found else None


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        "keep": FloatDistribution(*space.keep, log=True),
        **{name: CategoricalDistribution(values) for name, values in space.choices.items()},
        **{name: FloatDistribution(*limits, log=True) for name, limits in space.ranges.items()},
    }


def frozen(outcome: Outcome, space: Space, wanted: Search) -> FrozenTrial:
    """A trial that has ended: the share that remained is to be small, the drop within the budget."""
    import optuna

    made = optuna.trial.create_trial(
        value=outcome.reached or outcome.keep, params=outcome.params, distributions=distributions(space)
    )
    made.set_constraint(CONSTRAINT, excess(outcome, wanted))
    return made


def excess(outcome: Outcome, wanted: Search) -> float:
    """By how many points a trial breaks the budget; at most 0: it fits."""
    return (outcome.drop if outcome.drop is not None else UNKNOWN) - wanted.max_drop - 1e-9


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna keeps its remarks off the terminal."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def drop_half_line(path: Path) -> None:
    """Undo what a kill in the middle of a line leaves of it; nobody else may be writing."""
    if path.is_file():
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            path.write_bytes(kept)
