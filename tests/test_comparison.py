"""Methods side by side: the grid, the queue that workers share, the verdict, and the command on a small network."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.comparison import Grid, Queue, document, measure, outcome, read, work
from compress.comparison.grid import SCRATCH, TUNED, Cell, arguments, cells, labels, method_options, settle
from compress.comparison.verdict import EQUAL, Point, compare, height, sentence
from compress.errors import CompressError, UsageError
from tests.shell import answer, refusal
from tests.test_search import NET, net

GRID = Grid(models=("/a/net.pt",), methods=("halo", "l2"), targets=(0.5, 0.1), seeds=2)


class TestGrid:
    def test_every_method_target_and_seed_and_the_controls_once(self) -> None:
        every = list(cells(GRID))
        assert len(every) == len({cell.name for cell in every}) == 2 * (2 * 3 + 1)
        assert every[0] == Cell("/a/net.pt", "halo", 0.5, 0, "net") and every[0].name == "net-halo-0.5-0"
        assert [cell.seed for cell in every] == [0] * 7 + [1] * 7
        assert [cell.target for cell in every if cell.row == TUNED] == [None, None]
        assert sum(cell.row == SCRATCH for cell in every) == 4

    def test_networks_of_one_name_have_runs_of_their_own(self) -> None:
        models = ("/a/net.pt", "/b/net.pt", "/a/net.safetensors", "/模型.pt", "/网络.pt", "/a/other.pt")
        every = list(cells(GRID.model_copy(update={"models": models})))
        assert len({cell.name for cell in every}) == len(every) == 6 * 14
        called = labels(models)
        assert called["/a/other.pt"] == "other" and called["/a/net.pt"].startswith("net-")
        assert labels(models[:1]) == {"/a/net.pt": "net"}

    @pytest.mark.parametrize(
        ("row", "options"),
        [
            ("halo", ["--method", "halo"]),
            ("l2", ["--method", "l2"]),
            ("cka-sr", ["--method", "cka-sr", "--score", "l2"]),
            ("halo+taylor", ["--method", "halo", "--score", "taylor"]),
            ("ffr+halo", ["--method", "halo", "--regularize", "ffr"]),
            ("cka-sr+halo+l2", ["--method", "halo", "--score", "l2", "--regularize", "cka-sr"]),
        ],
    )
    def test_spellings(self, row: str, options: list[str]) -> None:
        assert method_options(row) == options

    @pytest.mark.parametrize("row", ["nothing", "l2+halo", "halo+", "l2+taylor"])
    def test_other_spellings_are_refused(self, row: str) -> None:
        with pytest.raises(UsageError, match="is unknown; there are"):
            method_options(row)

    def test_arguments_of_a_run(self, tmp_path: Path) -> None:
        grid = GRID.model_copy(update={"options": ("--epochs", "3"), "metric": "macs"})
        given = arguments(grid, Cell("/a/net.pt", "halo", 0.1, 1, "net"), tmp_path)
        text = f"prune /a/net.pt --method halo --seed 1 --epochs 3 --target 0.1 --metric macs --out {tmp_path} --resume"
        assert given == text.split()
        dense = arguments(grid, Cell("/a/net.pt", TUNED, None, 0, "net"), tmp_path)
        assert dense[:6] == ["prune", "/a/net.pt", "--method", "l2", "--target", "1"] and dense.count("--target") == 1

    def test_a_folder_holds_one_comparison(self, tmp_path: Path) -> None:
        assert read(tmp_path) is None
        settle(tmp_path / "a", GRID)
        settle(tmp_path / "a", GRID)
        assert read(tmp_path / "a") == GRID
        with pytest.raises(UsageError, match=r"was begun with seeds = 2, not 3; choose another --out"):
            settle(tmp_path / "a", GRID.model_copy(update={"seeds": 3}))


def report(value: float) -> dict[str, Any]:
    """As much of a run's report as a comparison reads."""
    figures = {"metric": {"name": "top1", "value": value}, "params": 10, "macs": 100, "size_bytes": 1000}
    return {
        "pruned": figures, "dense": {**figures, "metric": {"name": "top1", "value": 99.0}},
        "split": {"name": "test", "images": 10}, "val_top1": {"recovered": {"best": value}},
        "kept": {"params": 0.1, "macs": 0.1, "size": 0.1}, "data": {"fingerprint": "f"}, "seconds": {"recover": 1.0},
    }  # fmt: skip


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "queue") if request.param == "journal" else f"sqlite:///{tmp_path / 'queue.db'}"


def free(cell: str) -> bool:
    return True


def _impatient(lock: Any, path: str, grace_period: int | None = 30) -> None:
    lock._lock_target_file, lock._lock_file, lock.grace_period = path, f"{path}.lock", 0.2


class TestQueue:
    NAMES = tuple(f"cell-{index}" for index in range(6))

    def test_each_cell_is_done_once_whoever_works(self, storage: str) -> None:
        done: list[str] = []

        def run(cell: str) -> dict[str, Any]:
            done.append(cell)
            if cell == "cell-3":
                raise CompressError("the loss is NaN")
            return report(90.0)

        def worker() -> None:
            queue = Queue(storage, "x", free)
            queue.fill(self.NAMES)  # everybody asks for the same; the first has put it in
            work(queue, run, jobs=2)

        Queue(storage, "x", free).fill(self.NAMES)

        threads = [threading.Thread(target=worker) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        queue = Queue(storage, "x", free)
        assert sorted(set(done) - {"cell-3"}) == sorted(set(self.NAMES) - {"cell-3"}) == sorted(queue.outcomes())
        assert all(done.count(cell) == 1 for cell in self.NAMES if cell != "cell-3")
        assert queue.failures() == {"cell-3": "the loss is NaN"}
        queue.fill(self.NAMES)  # given again, the command tries what failed
        work(queue, lambda cell: report(80.0))
        assert queue.outcomes()["cell-3"]["value"] == 80.0 and queue.failures() == {}

    def test_what_two_have_put_in_at_once_is_done_once(self, tmp_path: Path) -> None:
        queue = Queue(str(tmp_path / "queue"), "x", free)
        queue.fill(["a", "a"])
        taken = queue.take()
        assert taken is not None and queue.take() is None
        queue.finish(taken[0], {"value": 1.0})
        queue.fill(["a"])
        assert queue.take() is None and queue.failures() == {}

    def test_an_interrupted_run_is_put_back(self, storage: str) -> None:
        def stopped(cell: str) -> dict[str, Any]:
            raise KeyboardInterrupt

        queue = Queue(storage, "x", free)
        queue.fill(["a"])
        with pytest.raises(KeyboardInterrupt):
            work(queue, stopped)
        assert queue.outcomes() == {} and queue.failures() == {}
        work(queue, lambda cell: report(90.0))
        assert list(queue.outcomes()) == ["a"]

    def test_the_run_of_a_dead_process_is_taken_over(self, tmp_path: Path, root: Path) -> None:
        path = tmp_path / "queue"
        program = f"""
import os, signal
from compress.comparison import Queue
queue = Queue({str(path)!r}, "x", lambda cell: True)
queue.fill(["a"])
queue.take()
os.kill(os.getpid(), signal.SIGKILL)
"""
        subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
        busy = Queue(str(path), "x", lambda cell: False)  # its run goes on without it
        assert busy.take() is None and busy.revive() and busy.take() is None
        queue = Queue(str(path), "x", free)
        assert queue.take() is None and queue.revive()
        work(queue, lambda cell: report(90.0))
        assert list(queue.outcomes()) == ["a"] and not queue.revive()

    def test_a_number_that_another_process_has_now_is_no_sign_of_life(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue = Queue(str(tmp_path / "queue"), "x", free)
        queue.fill(["a"])
        with monkeypatch.context() as patch:
            patch.setattr("psutil.Process.create_time", lambda self: 1.0)  # before the machine was started again
            assert queue.take() is not None
        assert queue.revive() and queue.take() is not None

    def test_half_a_line_and_a_lock_that_a_kill_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Queue("queue", "x", free).fill(["a"])
        with Path("queue").open("a") as file:
            file.write('{"op_code":')
        Path("queue.lock").symlink_to(tmp_path / "queue")
        monkeypatch.setattr("optuna.storages.journal.JournalFileSymlinkLock.__init__", _impatient)
        queue = Queue("queue", "x", free)
        assert queue.take() is not None and '"op_code":{' not in Path("queue").read_text()

    def test_a_worker_elsewhere_is_given_up_when_its_beat_stops(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue = Queue(str(tmp_path / "queue"), "x", free)
        queue.fill(["a"])
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        taken = queue.take()
        assert taken is not None
        monkeypatch.undo()
        clock = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: clock[0])
        assert queue.revive()
        clock[0] = 170.0
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        queue.beat(taken[0], 1)
        monkeypatch.setattr("socket.gethostname", lambda: "here")
        assert queue.revive() and queue.take() is None
        clock[0] = 349.0
        assert queue.revive() and queue.take() is None
        clock[0] = 351.0
        assert queue.revive() and queue.take() is not None
        queue.finish(taken[0], {"value": 1.0})  # the old worker comes back: the cell is another's
        assert queue.outcomes() == {}


def points(method: str, accuracies: list[list[float]], latencies: list[float]) -> list[Point]:
    """Rows of seeds, columns of targets."""
    return [
        Point(method, latency, seed, value, latency)
        for seed, row in enumerate(accuracies)
        for value, latency in zip(row, latencies, strict=True)
    ]


class TestVerdict:
    def test_interval_by_hand(self) -> None:
        # two targets, three seeds: each seed counts once, by its mean over the targets
        first = points("a", [[61.0, 72.0], [62.0, 75.0], [63.0, 74.0]], [1.0, 2.0])
        second = points("b", [[60.0, 70.0]] * 3, [1.0, 2.0])
        found, _ = compare([*first, *second], ("a", "b"))
        gaps = [1.5, 3.5, 3.5]
        assert found.mean == pytest.approx(np.mean(gaps)) and found.pairs == 6 and found.confidence == 0.95
        reach = 4.302652729749464 * np.std(gaps, ddof=1) / math.sqrt(3)  # Student's, 2 degrees, 97.5 %
        assert found.low is not None and found.high is not None
        assert found.high - found.mean == pytest.approx(reach) == pytest.approx(found.mean - found.low)
        # a third method: the variance is the mean over the three pairs, with two of its degrees of freedom per seed
        third = points("c", [[60.5, 71.0], [60.0, 70.5], [61.0, 70.0]], [1.0, 2.0])
        found = compare([*first, *second, *third], ("a", "b", "c"))[0]
        pairs = [gaps, [0.75, 3.25, 3.0], [-0.75, -0.25, -0.5]]
        variance = np.mean([np.var(pair, ddof=1) for pair in pairs])
        reach = 3.961 * math.sqrt(variance / 3)  # 4 degrees, 1 - 0.05 / 6
        assert found.high is not None and found.high - found.mean == pytest.approx(reach, rel=1e-3)

    @pytest.mark.parametrize("methods", [("a", "b"), ("a", "b", "c", "d")])
    @pytest.mark.parametrize("shared", [0.0, 1.0])
    def test_methods_that_are_all_the_same_seldom_win(self, methods: tuple[str, ...], shared: float) -> None:
        """`shared`: noise that all runs of one method and seed have in common, beside a noise of 1 of each run."""
        drawn, latencies = np.random.default_rng(0), [1.0, 1.3, 1.7]
        wins = 0
        for _ in range(100):
            runs = [
                p
                for name in methods
                for p in points(
                    name,
                    (drawn.normal([60.0, 66.0, 70.0], 1, (3, 3)) + drawn.normal(0, shared, (3, 1))).tolist(),
                    latencies,
                )
            ]
            wins += sentence(runs, methods)[0] is not None
        assert wins <= 10  # 5 % of 100 and more than two standard deviations above

    def test_equal_gaps_by_chance_prove_nothing(self) -> None:
        one, other = points("a", [[61.0], [62.0]], [1.0]), points("b", [[60.0], [61.0]], [1.0])
        assert sentence([*one, *other], ("a", "b"))[1] == "no verdict: the seeds do not tell how large the noise is"

    def test_a_target_that_one_seed_lacks_is_left_out(self) -> None:
        first = points("a", [[61.0, 90.0], [62.0, 91.0]], [1.0, 2.0])
        second = points("b", [[60.0, 70.0], [60.5, 70.0]], [1.0, 2.0])
        found = compare([p for p in (*first, *second) if (p.seed, p.target) != (1, 2.0)], ("a", "b"))[0]
        assert found.mean == pytest.approx(1.25) and found.pairs == 2

    def test_accuracy_between_two_points_is_straight_in_the_logarithm_of_latency(self) -> None:
        along = points("a", [[60.0, 80.0]], [1.0, 4.0])
        assert height(along, 2.0) == pytest.approx(70.0) and height(along, 4.0) == pytest.approx(80.0)
        assert height(along, 4.0 * EQUAL * 0.999) == 80.0 and height(along, 4.0 * EQUAL * 1.001) is None

    def test_a_slower_method_is_not_credited_with_its_latency(self) -> None:
        # the same curve, read at other latencies: no method is better
        first = points("a", [[60.0, 70.0, 80.0]] * 2, [1.0, 2.0, 4.0])
        second = [Point("b", p.target, p.seed, p.accuracy + 10 * math.log2(1.5), 1.5 * p.latency) for p in first]
        found, _ = compare([*first, *second], ("a", "b"))
        assert found.mean == pytest.approx(0.0, abs=1e-9)

    def test_who_wins(self) -> None:
        latencies = [1.0, 2.0]
        low = points("low", [[60.0, 70.0], [60.4, 70.2], [59.8, 70.1]], latencies)
        high = points("high", [[62.0, 72.1], [62.3, 72.0], [61.9, 72.3]], latencies)
        winner, text = sentence([*low, *high], ("low", "high"))
        assert winner == "high" and text.startswith("high wins: +2.0") and "against low at equal latency (95 %" in text
        assert "6 pairs of runs" in text
        noisy = points("noisy", [[58.0, 76.0], [66.0, 69.0], [63.0, 74.0]], latencies)
        winner, text = sentence([*low, *high, *noisy], ("low", "high", "noisy"))
        assert winner is None and text.startswith("no method wins: ") and text.endswith("which includes 0")
        assert "98.3 % interval" in text  # three pairs share the chance of a mistake

    def test_pairs_hold_both_ways_round(self) -> None:
        low = points("low", [[60.0], [61.0]], [1.0])
        high = [Point("high", 1.0, seed, value, 1.01) for seed, value in enumerate((62.0, 62.5))]
        one, other = compare([*low, *high], ("low", "high"))
        assert (one.first, other.first) == ("low", "high") and one.mean == pytest.approx(-1.75)
        assert one.low is not None and other.high == pytest.approx(-one.low)

    def test_where_there_is_no_verdict(self) -> None:
        one = points("a", [[60.0]], [1.0]) + points("b", [[90.0]], [1.0])
        assert sentence(one, ("a", "b")) == (None, "one seed: no verdict")
        far = points("a", [[60.0], [61.0]], [1.0]) + points("b", [[90.0], [91.0]], [2.0])
        assert sentence(far, ("a", "b"))[1].startswith("no verdict: the methods share no latency")
        assert sentence(far, ("a",))[0] is None


@pytest.fixture
def finished(pruned_run: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Grid]:
    """The folder of a comparison whose runs are all done; each is a copy of one run."""
    folder, result = pruned_run
    grid = Grid(models=("/a/net.pt",), methods=("l2",), targets=(0.3,), seeds=1)
    settle(tmp_path / "out", grid)
    queue = Queue(str(tmp_path / "out" / "compare.journal"), f"compare-{grid.digest}", free)
    queue.fill(cell.name for cell in cells(grid))
    while (taken := queue.take()) is not None:
        number, name = taken
        shutil.copytree(folder, tmp_path / "out" / "runs" / name, ignore=shutil.ignore_patterns("state"))
        queue.finish(number, outcome(json.loads(result.stdout)))
    return tmp_path / "out", grid


class TestCommandLine:
    def test_what_it_leaves_and_that_nothing_is_done_again(
        self, finished: tuple[Path, Grid], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("compress.comparison.latency.SECONDS", 0.2)
        folder, grid = finished
        content = answer("compare", "--out", folder, "-q")
        assert json.loads((folder / "compare.json").read_text()) == content and content["failed"] == {}
        assert {run["run"] for run in content["runs"]} == {cell.name for cell in cells(grid)}
        dense = content["dense_latency_ms"]["/a/net.pt"]
        for run in content["runs"]:
            own = json.loads((folder / "runs" / run["run"] / "report.json").read_text())
            assert run["value"] == own["pruned"]["top1"] and run["kept"] == own["kept"]
            assert run["latency_ms"] == pytest.approx(dense / run["speedup"]["value"])
        assert [row["method"] for row in content["rows"]] == ["l2", TUNED, SCRATCH]
        assert content["verdicts"]["/a/net.pt"]["sentence"] == "one seed: no verdict"
        page = (folder / "compare.html").read_text()
        assert page.count("data-figure=") == 1 and "one seed: no verdict" in page
        assert "://" not in re.sub(r"(?s)<script.*?</script>", "", page)
        assert answer("compare", "--out", folder, "-q") == content  # latencies are those measured before
        code, text = refusal("compare", __file__, "--methods", "l2", "--targets", "0.3", "--out", folder, "-q")
        assert code == 2 and "was begun with models = ('/a/net.pt',), not" in text

    @pytest.mark.slow
    def test_the_whole_of_it(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(NET)
        torch.save(net().state_dict(), tmp_path / "mine.pt")
        given = ["--arch", f"{tmp_path / 'mine.py'}:net", "--data", "digits", "--methods", "l2,cka-sr"]
        given += ["--targets", "0.5", "--epochs", "1", "--set", "data.image_size=8", "--set", "prune.round_to=1"]
        found = answer("compare", tmp_path / "mine.pt", *given, "--out", tmp_path / "out", "--jobs", "2", "-q")
        done = {"mine-l2-0.5-0", "mine-pruned-from-scratch-0.5-0", "mine-dense-fine-tuned-0"}
        assert {run["run"] for run in found["runs"]} == done
        # one epoch is too few for a method that trains before the cut: that row failed, and cost the others nothing
        assert list(found["failed"]) == ["mine-cka-sr-0.5-0"]
        assert "train.epochs = 1 is too few" in found["failed"]["mine-cka-sr-0.5-0"]

    def test_a_run_that_was_begun_goes_on_as_it_was_begun(self, pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
        """With other threads than now: those are in the run's recipe."""
        from compress.cli.compare import Children

        cell = next(cells(GRID))
        shutil.copytree(pruned_run[0], tmp_path / "runs" / cell.name)
        found = Children(tmp_path, GRID, 7).run(cell)
        assert found["pruned"] == json.loads(pruned_run[1].stdout)["pruned"]

    @pytest.mark.parametrize(("row", "is_shared"), [("halo", True), ("ggr", False), ("ffr", False), ("l2", False)])
    def test_runs_at_other_targets_share_the_training_towards_sparsity(
        self, row: str, is_shared: bool, pruned_run: tuple[Path, Any], tmp_path: Path
    ) -> None:
        """Not with another row, and not where it depends on the target."""
        from compress.cli.compare import Children

        grid = GRID.model_copy(update={"methods": (row,), "targets": (0.3, 0.1), "seeds": 1})
        first, _, second, *_ = cells(grid)
        assert (first.row, first.target, second.row, second.target) == (row, 0.3, row, 0.1)
        place = tmp_path / "runs" / first.name
        shutil.copytree(pruned_run[0], place)
        recipe = (place / "recipe.yaml").read_text()
        (place / "recipe.yaml").write_text(recipe.replace("method: halo", f"method: {row}"))
        if row == "ffr":
            (place / "recipe.yaml").unlink()
        if row == "l2":
            (place / "state" / "round-1.pt").unlink()
        assert Children(tmp_path, grid, 1)._reused(second) == (["--reuse", str(place)] if is_shared else [])

    def test_a_signal_to_this_process_alone_ends_the_runs(self, tmp_path: Path) -> None:
        queue, ended = Queue(str(tmp_path / "queue"), "x", free), threading.Event()
        queue.fill(["a"])

        def run(cell: str) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGINT)  # the process's: what raise_signal sends, this thread alone gets
            assert ended.wait(30), "nobody told the run to end"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work(queue, run, on_stop=ended.set)
        assert queue.outcomes() == {} and queue.failures() == {}

    def test_a_run_that_fails_says_why(self, tmp_path: Path) -> None:
        from compress.cli.compare import Children

        (tmp_path / "bad.pt").write_bytes(b"nothing")
        grid = GRID.model_copy(update={"models": (str(tmp_path / "bad.pt"),)})
        with pytest.raises(CompressError, match=r"bad.pt"):
            Children(tmp_path, grid, 1).run(next(cells(grid)))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ([], "holds no comparison yet"),
            (["--methods", "l2"], "a comparison needs checkpoints, --methods and --targets"),
            (["nowhere.pt", "--methods", "l2", "--targets", "0.5"], "there is no checkpoint nowhere.pt"),
            ([__file__, "--methods", "l3", "--targets", "0.5"], "'l3' is unknown"),
            ([__file__, "--methods", "l2", "--targets", "half"], "give shares with commas between them"),
            ([__file__, "--methods", "l2", "--targets", "0.5,2"], "shares above 0 and at most 1"),
            ([__file__, "--methods", "l2", "--targets", "0.5", "--storage", "no://db"], "cannot be opened"),
        ],
    )
    def test_refusals(self, tmp_path: Path, options: list[str], text: str) -> None:
        code, said = refusal("compare", *options, "--out", tmp_path / "out", "-q")
        assert code == 2 and text in said


def test_runs_without_files_are_listed_without_latency(tmp_path: Path) -> None:
    found = measure(tmp_path, {"/a/net.pt": ["net-l2-0.5-0"]}, bench={"batch": 1, "threads": 1, "runtime": "ort-cpu"})
    assert found["files"] == {} and found["dense"] == {}
    found_by = {
        "value": 90.0,
        "measured": "top1",
        "dense": 95.0,
        "split": {"name": "test"},
        "kept": {"params": 0.5, "macs": 0.5},
    }
    made = document(GRID, {"net-l2-0.5-0": found_by}, {}, found)
    assert made["rows"][0]["latency_ms"] is None and made["verdicts"]["/a/net.pt"]["sentence"] == "no run: no verdict"
