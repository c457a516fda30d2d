"""An accuracy budget as the target: where the search looks, that a kill changes nothing, and what it leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.checkpoint import ModelInfo
from compress.errors import AccuracyError, UsageError
from compress.folder import RunFolder
from compress.recipe import Recipe, make
from compress.search import Search, ladder, read, search, space, write
from compress.search.proposals import best, edge, propose
from compress.search.record import Journal
from compress.search.settings import Outcome, fits
from compress.search.space import Space
from tests.shell import answer, refusal

KEEP = Space(keep=(0.01, 0.95))
LIMITS = Space(
    keep=(0.01, 0.95),
    choices={"allocation": ("balanced", "uniform", "global")},
    ranges={"floor": (0.25, 1.0)},
    base={"allocation": "balanced", "floor": 0.5},
)


def explore(drop: Callable[[dict[str, Any]], float], where: Space, wanted: Search) -> list[Outcome]:
    """A search in which a trial's drop is a function of what it tries."""
    done: list[Outcome] = []
    while len(done) < wanted.trials:
        params = propose(done, where, wanted, seed=0)
        if params is None:
            break
        lost = drop(params)
        done.append(
            Outcome(number=len(done), state="done", params=params, reached=params["keep"], val=90 - lost, drop=lost)
        )
    return done


class TestProposals:
    @pytest.mark.parametrize("needed", [0.9, 0.4, 0.07, 0.012])
    def test_the_edge_is_found_from_both_sides(self, needed: float) -> None:
        wanted = Search(max_drop=1.0, trials=20)
        done = explore(lambda params: needed / params["keep"], KEEP, wanted)
        found = best(done, wanted)
        assert found is not None and needed <= found.keep <= 1.06 * needed
        assert len(done) <= 14 and len({outcome.keep for outcome in done}) == len(done)

    def test_it_goes_as_low_as_can_be_reached_and_ends_there(self) -> None:
        done = explore(lambda params: 0.0, KEEP, Search(max_drop=1.0, trials=50))
        assert [outcome.keep for outcome in done] == pytest.approx(ladder(KEEP))
        assert done[-1].keep == KEEP.keep[0]

    def test_it_goes_up_where_nothing_fits_and_ends_below_the_dense_network(self) -> None:
        wanted = Search(max_drop=1.0, trials=50)
        done = explore(lambda params: 5.0, LIMITS, wanted)
        assert [o.keep for o in done] == pytest.approx([0.5, 0.5**0.5, 0.5**0.25, 0.5**0.125, 0.95])
        assert best(done, wanted) is None

    def test_near_the_edge_other_limits_are_tried_and_each_trial_could_win(self) -> None:
        wanted = Search(max_drop=1.0, trials=12)

        def drop(params: dict[str, Any]) -> float:
            return 0.3 / params["keep"] * (0.7 if params["allocation"] == "uniform" else 1.0)

        done = explore(drop, LIMITS, wanted)
        found = best(done, wanted)
        assert found is not None and found.params["allocation"] == "uniform" and 0.21 <= found.keep < 0.24
        for index in range(1, len(done)):
            leader = best(done[:index], wanted)
            assert leader is None or done[index].keep < leader.keep
        assert done == explore(drop, LIMITS, wanted)  # a function of the trials and the seed

    def test_a_trial_that_ended_early_counts_as_one_that_does_not_fit(self) -> None:
        wanted = Search(max_drop=1.0)
        good = Outcome(number=0, state="done", params={"keep": 0.5}, reached=0.49, val=90.0, drop=0.5)
        for state in ("given up", "out of reach", "diverged"):
            bad = Outcome(number=1, state=state, params={"keep": 0.25}, drop=0.1 if state == "given up" else None)
            assert not fits(bad, wanted) and best([good, bad], wanted) == good
            assert edge([good, bad], good, KEEP) == (0.25, 0.49)

    def test_of_equally_small_networks_the_more_accurate_wins(self) -> None:
        first = Outcome(number=0, state="done", params={"keep": 0.5}, reached=0.4, val=90.0, drop=0.9)
        second = Outcome(number=1, state="done", params={"keep": 0.45}, reached=0.4, val=90.5, drop=0.4)
        assert best([first, second], Search(max_drop=1.0)) == second


class TestJournal:
    def test_a_trial_that_was_killed_is_found_again_and_a_half_written_line_is_dropped(self, tmp_path: Path) -> None:
        path, wanted = tmp_path / "journal", Search(max_drop=1.0)
        journal = Journal(path)
        params = {"keep": 0.5, **LIMITS.base}
        number = journal.begin(params, LIMITS)
        with path.open("ab") as file:
            file.write(b'{"op_code":')
        (tmp_path / "journal.lock").symlink_to("nowhere")
        again = Journal(path)
        assert again.begun() == (number, params) and again.done() == []
        outcome = Outcome(number=number, state="done", params=params, reached=0.49, val=90.0, drop=0.5, seconds=1.0)
        again.end(outcome, wanted)
        assert Journal(path).done() == [outcome] and Journal(path).begun() is None

    def test_optuna_reads_it(self, tmp_path: Path) -> None:
        import optuna

        journal = Journal(tmp_path / "journal")
        for keep, lost in ((0.5, 0.5), (0.25, 3.0)):
            number = journal.begin({"keep": keep}, KEEP)
            found = {"reached": keep, "val": 90.0, "drop": lost}
            journal.end(Outcome(number=number, state="done", params={"keep": keep}, **found), Search(max_drop=1.0))
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal")))
        study = optuna.load_study(study_name="search", storage=storage)
        assert study.best_trial.number == 0 and study.best_value == 0.5  # 0.25 breaks the budget


def net(width: int = 12) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


NET = """
from torch import nn

def net(width=12):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )
"""


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network that knows the digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    model, digits = net(), load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


INFO = ModelInfo(arch="net", input_size=(3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def recipe_of(**train: object) -> Recipe:
    return make(
        {
            "model": {"path": "x"},
            "data": {"source": "digits", "image_size": 8},
            "prune": {"round_to": 1},
            "train": {"epochs": 2, "compile": "off", **train},
            "device": "cpu",
            "bench": {"batches": [1], "seconds": 1},
        }
    )


def begin(place: Path, recipe: Recipe) -> RunFolder:
    return RunFolder.create(place, recipe.to_yaml())


def comparable(content: dict[str, Any]) -> dict[str, Any]:
    """search.json without its clock."""
    trials = [{**trial, "seconds": 0} for trial in content["trials"]]
    return {**content, "seconds": 0, "trials": trials}


class TestSearch:
    def test_stopped_in_a_trial_and_continued_it_finds_the_same_network(
        self, trained: nn.Module, tmp_path: Path
    ) -> None:
        recipe, wanted = recipe_of(), Search(max_drop=8.0, trials=2)
        whole = search(recipe, trained, INFO, wanted=wanted, folder=begin(tmp_path / "whole", recipe))

        def stop(event: Any) -> None:
            at = event.progress
            if event.stage == "recover" and at is not None and at.top1 is not None:
                heard.append(at.epoch)
                if len(heard) == 3:  # the second trial's last epoch but one
                    raise KeyboardInterrupt

        heard: list[int] = []
        folder = begin(tmp_path / "broken", recipe)
        with pytest.raises(KeyboardInterrupt):
            search(recipe, trained, INFO, wanted=wanted, folder=folder, on_event=stop)
        broken = search(recipe, trained, INFO, wanted=wanted, folder=folder)
        assert comparable(broken["search"]) == comparable(whole["search"])
        assert broken["kept"] == whole["kept"] and broken["pruned"]["top1"] == whole["pruned"]["top1"]
        self.check(tmp_path / "whole", whole, wanted)

    def test_trials_share_their_training_towards_sparsity(self, trained: nn.Module, tmp_path: Path) -> None:
        """Whether or not the trial that has trained fits the budget."""
        recipe = recipe_of()
        recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"method": "halo"})})
        for drop, name in ((90.0, "all fit"), (-100.0, "none fits")):
            trained_in: list[int] = []

            def note(event: Any) -> None:
                if event.stage == "search" and event.text.startswith("trial "):
                    trained_in.append(0)  # noqa: B023  called at once
                if event.stage == "round-1" and event.progress is not None and event.progress.top1 is not None:
                    trained_in[-1] += 1  # noqa: B023

            folder, wanted = begin(tmp_path / name, recipe), Search.model_construct(max_drop=drop, trials=3)
            with suppress(AccuracyError):
                search(recipe, trained, INFO, wanted=wanted, folder=folder, on_event=note)
            assert trained_in == [1, 0, 0]

    def check(self, folder: Path, report: dict[str, Any], wanted: Search) -> None:
        """The folder is an ordinary run's: the winner's, which is the smallest that fits."""
        found = report["search"]
        fit = [trial for trial in found["trials"] if trial["fits"]]
        assert fit and len(found["trials"]) == wanted.trials
        winner = min(fit, key=lambda trial: trial["reached"])
        assert found["winner"] == winner["number"] and report["target"] == winner["params"]["keep"]
        assert report["kept"]["params"] == pytest.approx(winner["reached"])
        assert report["val_top1"]["recovered"]["best"] == winner["val"]
        assert winner["drop"] == pytest.approx(found["reference"] - winner["val"])
        assert found["reference"] == report["val_top1"]["dense"]
        for trial in found["trials"]:  # the weights of the others are gone, how they went is not
            place = folder / "trials" / f"{trial['number']:03d}"
            assert (place / "metrics.jsonl").is_file()
            assert (place / "pruned.safetensors").is_file() == (trial["number"] == winner["number"])
        text = (folder / "search.html").read_text()
        assert text.count("data-figure=") == 1 and "://" not in re.sub(r"(?s)<script.*?</script>", "", text)

        from compress.verify import verify

        def rebuild() -> tuple[nn.Module, ModelInfo]:
            from compress import checkpoint

            model = net()
            read = checkpoint.read(folder / "pruned.safetensors")
            checkpoint.load_into(model, read)
            return model.eval(), read.info

        checks = verify(folder, rebuild, source="digits")
        assert [check.name for check in checks if check.state == "FAILED"] == [], checks

    def test_nothing_fits(self, trained: nn.Module, tmp_path: Path) -> None:
        recipe = recipe_of(lr=1e-9, epochs=1, distill=0.0)
        recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"fold": False})})
        folder = begin(tmp_path / "run", recipe)
        wanted = Search.model_construct(max_drop=-100.0, trials=3)  # 0 points fit where a processor rounds luckily
        with pytest.raises(AccuracyError) as caught:
            search(recipe, trained, INFO, wanted=wanted, folder=folder)
        found = json.loads((tmp_path / "run" / "search.json").read_text())
        smallest = min(found["trials"], key=lambda trial: trial["drop"])
        assert caught.value.exit_code == 7
        assert f"the smallest drop was {smallest['drop']:.2f} points, at {smallest['reached']:.3g}" in str(caught.value)
        assert found["winner"] is None and len(found["trials"]) == 3
        assert not (tmp_path / "run" / "model.onnx").exists()

    def test_a_hopeless_trial_is_given_up_halfway(self, trained: nn.Module, tmp_path: Path) -> None:
        recipe = recipe_of(lr=1e-9, epochs=4, distill=0.0)
        recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"fold": False, "metric": "macs"})})
        with pytest.raises(AccuracyError):
            wanted = Search(max_drop=0.0, trials=1)
            search(recipe, trained, INFO, wanted=wanted, folder=begin(tmp_path / "run", recipe))
        trial = json.loads((tmp_path / "run" / "search.json").read_text())["trials"][0]
        assert trial["state"] == "given up" and trial["drop"] > 10 and trial["reached"] <= 0.5
        lines = (tmp_path / "run" / "trials" / "000" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) <= 2

    def test_the_drop_may_be_counted_from_the_dense_network_trained_for_as_long(
        self, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = recipe_of(epochs=1)
        wanted = Search(max_drop=50.0, trials=1, against="tuned")
        report = search(recipe, trained, INFO, wanted=wanted, folder=begin(tmp_path / "run", recipe))
        lines = (tmp_path / "run" / "trials" / "dense" / "metrics.jsonl").read_text().splitlines()
        assert report["search"]["reference"] == max(json.loads(line)["val_top1"] for line in lines)
        assert report["search"]["trials"][0]["params"]["keep"] == 0.5
        self.check_killed_while_it_installs(trained, recipe, wanted, report, tmp_path / "run", monkeypatch)

    def check_killed_while_it_installs(
        self, trained: nn.Module, recipe: Recipe, wanted: Search, report: dict[str, Any], place: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """state/info.json says that the copy of the dense network is whole: it goes first and comes last."""

        def half(source: Path, target: Path) -> None:
            if Path(source).name == "dense.safetensors":
                Path(target).write_bytes(b"half")
                raise KeyboardInterrupt
            shutil.copyfile(source, target)

        (place / "state" / "winner.json").unlink()
        with monkeypatch.context() as patch:
            patch.setattr("compress.search.run.shutil", SimpleNamespace(copyfile=half, rmtree=shutil.rmtree))
            with pytest.raises(KeyboardInterrupt):
                search(recipe, trained, INFO, wanted=wanted, folder=RunFolder.open(place))
        assert not (place / "state" / "info.json").exists() and not (place / "state" / "dense.safetensors").exists()
        again = search(recipe, trained, INFO, wanted=wanted, folder=RunFolder.open(place))
        assert again["pruned"]["top1"] == report["pruned"]["top1"] and (place / "state" / "info.json").is_file()


class TestSpace:
    def test_it_begins_at_the_lowest_share_in_reach(self) -> None:
        from compress.pipeline import dry_run
        from compress.search.space import at

        recipe = recipe_of()
        found = space(recipe, net(), INFO)
        dry_run(at(recipe, {"keep": found.keep[0]}), net(), torch.randn(1, 3, 8, 8))
        assert found.keep[0] < 0.05 and set(found.base) == {"allocation", "floor"}

    def test_what_the_recipe_sets_is_not_searched(self, tmp_path: Path) -> None:
        recipe = make({"model": {"path": "x"}, "prune": {"allocation": "uniform"}, "data": {"image_size": 8}})
        assert not space(recipe, net(), INFO).has_limits
        recipe = make({"model": {"path": "x"}, "prune": {"granularity": "weight"}, "data": {"image_size": 8}})
        assert not space(recipe, net(), INFO).has_limits

    def test_a_sensitivity_adds_a_limit(self, tmp_path: Path) -> None:
        from compress.sensitivities import sensitivity

        batches = [(torch.randn(4, 3, 8, 8), None)]
        (tmp_path / "s.json").write_text(sensitivity(net(), batches).model_dump_json())
        recipe = make({"model": {"path": "x"}, "prune": {"sensitivity": str(tmp_path / "s.json")}})
        assert space(recipe, net(), INFO).base["max_group_distortion"] == 0.5


class TestCommandLine:
    @pytest.fixture
    def files(self, trained: nn.Module, tmp_path: Path, in_the_repository: None) -> list[str]:
        (tmp_path / "mine.py").write_text(NET)
        torch.save(trained.state_dict(), tmp_path / "mine.pt")
        return [str(tmp_path / "mine.pt"), "--arch", f"{tmp_path / 'mine.py'}:net", "--data", "digits"]

    def test_from_the_dry_run_to_another_trial(self, files: list[str], tmp_path: Path) -> None:
        given = [*files, "--epochs", "1", "--set", "data.image_size=8", "--round-to", "1", "--device", "cpu"]
        given += ["--set", "bench.batches=[1]", "--set", "bench.seconds=1"]
        budget = ["--max-drop", "90", "--out", tmp_path / "run"]
        plan = answer("prune", *given, *budget, "--dry-run", "-q")
        assert plan["ladder"][:2] == [0.5, 0.25] and not (tmp_path / "run").exists()
        first = answer("prune", *given, *budget, "--trials", "1", "-q")
        assert first["kept"]["params"] <= 0.5 and len(first["search"]["trials"]) == 1
        again = answer("resume", tmp_path / "run", "-q")
        assert again["search"] == first["search"]
        more = answer("prune", *given, *budget, "--trials", "2", "--resume", "-q")
        assert [trial["params"]["keep"] for trial in more["search"]["trials"]] == pytest.approx([0.5, 0.249], abs=0.01)
        assert more["kept"]["params"] < first["kept"]["params"]
        code, text = refusal("prune", *given, "--max-drop", "2", "--out", tmp_path / "run", "--resume", "-q")
        assert code == 2 and "was begun with --max-drop 90.0, not 2.0" in text

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--max-drop", "1", "--target", "0.5"], "--target and --max-drop exclude each other"),
            (["--trials", "3"], "--trials and --against belong to --max-drop"),
            (["--max-drop", "-1"], "--max-drop -1.0: input should be greater than or equal to 0"),
            (["--max-drop", "1", "--against", "best"], "--against best: input should be 'given' or 'tuned'"),
        ],
    )
    def test_refusals(self, files: list[str], options: list[str], text: str) -> None:
        code, said = refusal("prune", *files, *options, "-q")
        assert code == 2 and text in said


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    wanted, recipe = Search(max_drop=1.0), recipe_of()
    write(tmp_path, wanted, recipe)
    assert read(tmp_path) == (wanted, recipe)
    (tmp_path / "search.yaml").write_text("search: {}\n")
    with pytest.raises(UsageError, match=r"search.yaml is damaged"):
        read(tmp_path)
