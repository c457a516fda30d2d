"""The loop: phases that can be taken up again, losses that stop a run, and a network that is plain afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress import train
from compress.data import Loader, load, loader
from compress.errors import DivergedError, PruneError, TrackerError, UsageError
from compress.groups import trace
from compress.regularize import (
    REGULARIZERS,
    SPARSE_TRAINING,
    CkaSr,
    Ffr,
    Ggr,
    Halo,
    Regularizer,
    given_places,
)
from compress.regularize.make import make
from compress.task import Classification
from compress.train import Outcome, Progress, Settings, accelerator, evaluate, finetune, recalibrate, schedule
from tests.nets import NETS

SETTINGS = Settings(epochs=3, lr=0.02, seed=3)


@pytest.fixture(scope="module")
def batches() -> tuple[Loader, Loader]:
    digits = load("digits", image_size=8, seed=0)
    options = {"batch_size": 128, "mean": (0.3,) * 3, "std": (0.35,) * 3}
    return loader(digits.train, train=True, **options), loader(digits.val, train=False, **options)


@pytest.fixture
def device():
    return accelerator("cpu", "fp32")


def network() -> nn.Module:
    torch.manual_seed(0)
    return NETS["residual"]()


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


def test_it_learns_and_leaves_a_plain_network(batches, device) -> None:
    model = network()
    seen: list[Progress] = []
    outcome = finetune(model, *batches, SETTINGS, device=device, on_progress=seen.append)
    assert outcome.history[-1]["loss"] < outcome.history[0]["loss"]
    assert outcome.best_top1 > 30 and len(outcome.history) == 3
    assert [p.top1 is not None for p in seen].count(True) == 3 and seen[-1].seconds_left == pytest.approx(0)
    assert not model.training and not any(p.grad is not None for p in model.parameters())
    assert "forward" not in vars(model) and not any(m._forward_hooks for m in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize(("augment", "passes"), [("none", 1), ("auto", SETTINGS.epochs)])
def test_a_teacher_is_asked_once_of_images_that_never_change(device, augment: str, passes: int) -> None:
    digits = load("digits", image_size=8, seed=0)
    options = {"batch_size": 128, "mean": (0.3,) * 3, "std": (0.35,) * 3}
    images, seen = loader(digits.train, train=True, augment=augment, **options), []
    teacher = network().eval()
    teacher.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    told, asked = network(), network()
    settings = replace(SETTINGS, distill=0.9)
    finetune(told, images, loader(digits.val, train=False, **options), settings, device=device, teacher=teacher)
    one_pass = len(digits.train) if augment == "none" else 128 * len(images)
    assert sum(seen) == passes * one_pass
    fresh = _Asked(images)
    finetune(asked, fresh, loader(digits.val, train=False, **options), settings, device=device, teacher=teacher)
    for one, other in zip(told.parameters(), asked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class _Asked:
    """A loader that hides that its images never change."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner
        self.set_epoch = inner.set_epoch

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        return iter(self.inner)


TOGETHER: dict[str, Callable[[], list[Regularizer]]] = {
    "nothing": list,
    **{name: lambda make=make: [make()] for name, make in REGULARIZERS.items()},
    "halo by sgd": lambda: [Halo(solver="sgd")],
    "halo by sgd and weight": lambda: [Halo(solver="sgd", granularity="weight")],
    "ffr by flow": lambda: [Ffr(score="flow", period=2)],
    "ggr and cka-sr": lambda: [Ggr(density=0.3, interval=4), CkaSr(period=3)],
    "halo and ffr": lambda: [Halo(), Ffr()],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_a_resumed_phase_equals_an_unbroken_one(batches, device, tmp_path, name: str) -> None:
    def phase(model: nn.Module, state, stop_after: int | None = None) -> Outcome:
        made = TOGETHER[name]()
        for regularizer in made:
            regularizer.attach(model, trace(model, torch.randn(1, 3, 8, 8)))

        def stop(progress: Progress) -> None:
            if progress.top1 is not None and progress.epoch + 1 == stop_after:
                raise KeyboardInterrupt

        fixed = given_places(made, [()] * len(made))
        settings = Settings(epochs=3, lr=0.02, seed=3, penalty_share=0.5, fixed=fixed, keep_best=True)
        return finetune(model, *batches, settings, device=device, regularizers=made, state=state, on_progress=stop)

    whole, broken = network(), network()
    expected = phase(whole, tmp_path / "whole.pt")
    for epoch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            phase(broken, tmp_path / "broken.pt", stop_after=epoch)
        broken = network()  # another process would start from the same weights
    found = phase(broken, tmp_path / "broken.pt")
    assert equal(whole, broken)
    assert [{k: v for k, v in e.items() if k != "seconds"} for e in found.history] == [
        {k: v for k, v in e.items() if k != "seconds"} for e in expected.history
    ]
    assert found.strengths == expected.strengths and found.best_epoch == expected.best_epoch
    assert found.lambda_log == expected.lambda_log
    assert bool(found.lambda_log) is name.startswith(("halo", "growing-reg"))  # whose lambda moves
    assert [step for step, _ in found.lambda_log] in ([], [*range(1, 3 * len(batches[0]) + 1)])


def test_a_phase_goes_on_however_the_weights_lie_in_memory(batches, device, tmp_path) -> None:
    def phase(model: nn.Module, state: Path, stop_after: int | None = None) -> nn.Module:
        halo = Halo(solver="sgd", granularity="weight", xi=1e-6)
        halo.attach(model, ())

        def stop(progress: Progress) -> None:
            if progress.top1 is not None and progress.epoch + 1 == stop_after:
                raise KeyboardInterrupt

        finetune(model, *batches, SETTINGS, device=device, regularizers=[halo], state=state, on_progress=stop)
        return model

    whole = phase(network(), tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        phase(network(), tmp_path / "broken.pt", stop_after=1)
    assert equal(whole, phase(network().to(memory_format=torch.channels_last), tmp_path / "broken.pt"))


def test_the_strength_is_the_named_share_of_the_task_loss(batches, device) -> None:
    for name in REGULARIZERS.keys() - SPARSE_TRAINING:
        model = network()
        before = copy.deepcopy(model)
        regularizer = REGULARIZERS[name]()
        regularizer.attach(model, trace(model, torch.randn(1, 3, 8, 8)))
        seen: list[Progress] = []
        settings = Settings(epochs=1, lr=1e-9, penalty_share=0.25, warmup=0.0)
        finetune(model, *batches, settings, device=device, regularizers=[regularizer], on_progress=seen.append)
        assert seen[-1].penalty == pytest.approx(0.25 * seen[-1].loss, rel=0.05)
        assert torch.equal(model[0].weight, before[0].weight) or (model[0].weight - before[0].weight).abs().max() < 1e-6
        regularizer.detach()


def test_a_penalty_below_zero_is_calibrated_by_its_size(batches, device) -> None:
    """An unbiased CKA may be below 0, and wander around it; a strength below 0 would turn the method round."""

    class Wandering(REGULARIZERS["lasso"]):
        signs = iter((-1, 1, -1, -1))

        def penalty(self) -> torch.Tensor:
            return next(self.signs, 1) * super().penalty()

    model = network()
    regularizer = Wandering()
    regularizer.attach(model, ())
    outcome = finetune(
        model, *batches, Settings(epochs=1, lr=1e-9, penalty_share=0.25), device=device, regularizers=[regularizer]
    )
    plain = REGULARIZERS["lasso"]()
    again = network()
    plain.attach(again, ())
    wanted = finetune(
        again, *batches, Settings(epochs=1, lr=1e-9, penalty_share=0.25), device=device, regularizers=[plain]
    )
    assert outcome.strengths == wanted.strengths and outcome.strengths[0]["strength"] > 0


def test_a_network_that_fits_its_data_is_still_penalised(batches, device) -> None:
    """A tenth of the loss of guessing is the least that the share refers to."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 10)
            self.labels: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv2(self.conv1(x)).mean((2, 3))) * 0 + 50 * F.one_hot(self.labels, 10)

    class Telling:
        def __init__(self, inner: Loader, model: Sure) -> None:
            self.inner, self.model = inner, model

        def __len__(self) -> int:
            return len(self.inner)

        def set_epoch(self, epoch: int) -> None:
            self.inner.set_epoch(epoch)

        def __iter__(self):
            for images, labels in self.inner:
                self.model.labels = labels
                yield images, labels

    model = Sure()
    halo = REGULARIZERS["halo"]()
    halo.attach(
        model, trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), torch.randn(1, 3, 8, 8))[:0] or _group()
    )
    told = [Telling(part, model) for part in batches]
    seen: list[Progress] = []
    finetune(
        model,
        *told,
        Settings(epochs=1, lr=1e-9, penalty_share=0.5),
        device=device,
        regularizers=[halo],
        on_progress=seen.append,
    )
    assert seen[-1].loss < 1e-6
    assert seen[-1].penalty == pytest.approx(0.5 * 0.1 * math.log(10), rel=0.01)


def _group():
    from compress.groups import Group, Slice

    return (Group("conv1", 4, (Slice("conv1.weight", 0), Slice("conv2.weight", 1))),)


def test_a_diverged_loss_stops_and_the_last_good_state_stays(batches, device, tmp_path) -> None:
    model = network()
    state = tmp_path / "state.pt"

    def poison(progress: Progress) -> None:
        if progress.top1 is not None and progress.epoch == 0:
            with torch.no_grad():
                model[0].weight[0, 0, 0, 0] = math.inf

    with pytest.raises(DivergedError, match=r"infinite in training at epoch 2, step 1 of \d+; .* lower train.lr"):
        finetune(model, *batches, SETTINGS, device=device, state=state, on_progress=poison)
    kept = torch.load(state, weights_only=True)
    assert kept["epoch"] == 1 and all(bool(t.isfinite().all()) for t in kept["model"].values())


def test_distillation_pulls_towards_the_teacher(batches, device) -> None:
    teacher = network().eval()
    torch.manual_seed(1)
    student = NETS["residual"]()

    def distance() -> float:
        images, _ = next(iter(batches[1]))
        with torch.no_grad():
            return float(
                F.kl_div(
                    F.log_softmax(student.eval()(images), 1),
                    F.log_softmax(teacher(images), 1),
                    log_target=True,
                    reduction="batchmean",
                )
            )

    finetune(student, *batches, Settings(epochs=1, lr=1e-9, distill=1.0), device=device, teacher=teacher)
    before = distance()
    frozen = copy.deepcopy(teacher)
    finetune(student, *batches, Settings(epochs=3, lr=0.02, distill=1.0), device=device, teacher=teacher)
    assert distance() < 0.5 * before
    assert equal(frozen, teacher)


def test_recalibration_measures_plain_averages_and_touches_no_weight(batches, device) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[1].running_mean.fill_(7)
    before = [p.clone() for p in model.parameters()]
    images = [x for x, _ in batches[1]][:1]
    recalibrate(model, [(images[0], torch.zeros(0))], device=device)
    with torch.no_grad():
        expected = model[0](images[0]).mean((0, 2, 3))
    assert torch.allclose(model[1].running_mean, expected, atol=1e-5)
    assert model[1].momentum == 0.1 and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_top1_and_loss_by_hand(batches, device) -> None:
    model = network().eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches[1]])
    labels = torch.cat([y for _, y in batches[1]])
    top1, loss = evaluate(model, batches[1], device=device)
    assert top1 == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_the_schedule_rises_then_falls_to_nothing() -> None:
    rates = [schedule(i / 100, 0.1) for i in range(101)]
    assert rates[0] < 0.05 and max(rates) == pytest.approx(1, abs=0.02) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates.index(max(rates)) in (10, 11)
    assert schedule(0, 0) == 1


def test_phases_that_share_a_schedule_go_through_it_once(batches, device, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[float] = []
    monkeypatch.setattr(train.loop, "schedule", lambda share, warmup: done.append(share) or schedule(share, warmup))
    finetune(network(), *batches, replace(SETTINGS, epochs=3), device=device)
    whole, done[:] = list(done), []
    finetune(network(), *batches, replace(SETTINGS, epochs=1, span=(0, 1 / 3)), device=device)
    finetune(network(), *batches, replace(SETTINGS, epochs=2, span=(1 / 3, 1)), device=device)
    assert done == pytest.approx(whole) and len(done) == 3 * len(batches[0])


def test_compiling_pays_only_for_long_training(batches, device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    assert not train.compile_pays(model, batches[0], epochs=1, device=device)
    assert train.compile_pays(model, batches[0], epochs=10**7, device=device)
    monkeypatch.setattr("compress.train.device.shutil.which", lambda name: None)
    assert not train.compile_pays(model, batches[0], epochs=10**7, device=device)


def test_bf16_runs_where_the_processor_has_it(batches) -> None:
    if not train.has_bf16(on_cpu=True):
        pytest.skip("no bf16 in hardware here")
    device = accelerator("cpu", "auto")
    assert device.mixed_precision == "bf16"
    model = network()
    outcome = finetune(model, *batches, SETTINGS, device=device)
    assert outcome.best_top1 > 25 and all(p.dtype == torch.float32 for p in model.parameters())


def test_a_resumed_phase_equals_an_unbroken_one_with_dropout(batches, device, tmp_path) -> None:
    """Calibration draws random numbers too; how many were drawn before must not matter."""

    def phase(drawn_before: int) -> nn.Module:
        model = nn.Sequential(*network()[:-1], nn.Dropout(0.5), network()[-1])
        halo = REGULARIZERS["halo"]()
        halo.attach(model, trace(model, torch.randn(1, 3, 8, 8)))
        torch.manual_seed(5)
        torch.rand(drawn_before)
        finetune(model, *batches, Settings(epochs=1, lr=0.02, penalty_share=0.5), device=device, regularizers=[halo])
        return model

    assert equal(phase(0), phase(100))


def test_another_training_does_not_go_on_from_a_state(batches, device, tmp_path) -> None:
    state, settings = tmp_path / "x.state", Settings(epochs=1, lr=0.01)
    finetune(network(), *batches, settings, device=device, state=state)
    with pytest.raises(UsageError, match=r"left by a training with epochs = 1, not 2; begin anew"):
        finetune(network(), *batches, replace(settings, epochs=2), device=device, state=state)
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(UsageError, match="left by the training of another network"):
        finetune(other, *batches, settings, device=device, state=state)


@pytest.mark.parametrize(
    ("name", "begun", "asked", "words"),
    [
        ("ffr", {"norm": "l1"}, {"norm": "l2"}, "whose Ffr had norm = 'l1', not 'l2'"),
        ("halo", {"solver": "sgd"}, {}, "whose Halo had solver = 'sgd', not 'closed-form'"),
        (
            "ggr",
            {"density": 0.5, "interval": 3},
            {"density": 0.5, "interval": 7},
            r"whose Ggr had updates = .*interval=3",
        ),
        ("cka-sr", {"period": 2}, {"period": 2, "beta": 1.0}, ""),  # a strength is in the state
    ],
)
def test_a_training_does_not_go_on_with_other_options(
    name: str, begun: dict[str, Any], asked: dict[str, Any], words: str, batches, device, tmp_path: Path
) -> None:
    def phase(options: dict[str, Any]) -> None:
        model = network()
        (method,) = make({name: options}, {})
        method.attach(model, trace(model, torch.randn(1, 3, 8, 8)))
        settings = Settings(epochs=1, lr=0.01)
        finetune(model, *batches, settings, device=device, regularizers=[method], state=tmp_path / "x.state")

    phase(begun)
    with pytest.raises(UsageError, match=words) if words else nullcontext():
        phase(asked)


def test_outputs_of_auxiliary_classifiers_do_not_count() -> None:
    logits = torch.randn(2, 3)
    assert Classification().logits((logits, torch.randn(2, 3))) is logits is Classification().logits(logits)


def test_a_penalty_of_zero_is_refused(batches, device) -> None:
    model = NETS["plain"]()  # no two activations of equal shape in a row
    made = REGULARIZERS["ffr"]()
    made.attach(model, ())
    with pytest.raises(PruneError, match="Ffr finds nothing to penalise in this network"):
        finetune(model, *batches, Settings(epochs=1, penalty_share=0.1), device=device, regularizers=[made])


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"the device .* is unknown; allowed are auto, cpu, cuda and cuda:N"):
        accelerator(name)


def test_devices_and_trackers_that_are_not_here_are_refused() -> None:
    with pytest.raises(UsageError, match="there is no device cuda:99"):
        accelerator("cuda:99")
    with pytest.raises(TrackerError, match="nonsense"):
        accelerator("cpu", "fp32", ["nonsense"])
