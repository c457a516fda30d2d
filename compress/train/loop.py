"""Training: one loop for every phase, with regularisers, distillation and a state that survives a kill.

An epoch is a pure function of (state, seed, epoch): order, augmentation and dropout are seeded by them, so that a run
resumed at the last finished epoch ends with the same weights as an unbroken one on the same machine.

Several processes (compress/ranks.py) train together: each takes its loader's share of every batch, the gradients are
the means over all, batch norms see their own process's images in a step, and evaluation counts every image once.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress import ranks
from compress.data import Loader
from compress.errors import DivergedError, PruneError, UsageError
from compress.example import Example
from compress.files import atomic_path
from compress.regularize import Regularizer, chosen, lambdas, numbers
from compress.train.device import seeded
from compress.train.evaluate import evaluate, predict
from compress.train.feed import Feed
from compress.train.objective import Losses, shared
from compress.train.settings import Outcome, Progress, Settings, schedule
from compress.unstrided import unstrided

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
LAMBDAS = 40  # how often a phase looks at a lambda that moves: enough for a line
LEAST_LOSS = 0.1  # of the loss of guessing, ln(classes); see _Phase.calibrate


def finetune(
    model: nn.Module,
    train: Loader | Feed,
    val: Loader | Feed,
    settings: Settings,
    *,
    device: Accelerator,
    regularizers: Sequence[Regularizer] = (),
    teacher: nn.Module | None = None,
    state: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train `model` in place for `settings.epochs` epochs.

    Several processes all call this, each with its share of the images, and end with the same weights; `model` starts
    from rank 0's, and is plain afterwards.

    Args:
        regularizers: attached already; their penalties join the loss.
        teacher: in evaluation mode; its softened labels weigh `settings.distill` in the loss.
        train, val: what `settings.task` unpacks; a Feed holds batches of one's own.
        state: file written after every epoch; if it exists, training goes on from there. Rank 0 alone opens it.

    Raises:
        DivergedError: the loss became NaN or infinite; the file at `state` holds the last good epoch.
    """
    phase = _Phase(model, train, settings, device, regularizers, teacher)
    if settings.compile and any(m._forward_hooks for m in model.modules()):
        log.warning("%s is not compiled: what watches or guards its layers would be lost", settings.phase)
    elif settings.compile:
        model.compile()
    try:
        outcome, start = phase.restore(state)
        phase.lambda_log = outcome.lambda_log
        if start == 0:
            outcome.strengths = phase.calibrate()
        best = phase.best
        for epoch in range(start, settings.epochs):
            began = time.perf_counter()
            loss, penalty = phase.run_epoch(epoch, on_progress, state)
            top1, val_loss = evaluate(model, val, device=device, task=settings.task)
            if not math.isfinite(val_loss):
                raise phase.diverged(f"at the end of epoch {epoch + 1}", state)
            seconds = time.perf_counter() - began
            outcome.last_top1 = top1
            outcome.history.append(
                {"epoch": epoch, "loss": loss, "penalty": penalty, "val_top1": top1, "val_loss": val_loss}
                | {"seconds": seconds}
            )
            if settings.keep_best and top1 >= outcome.best_top1:
                best = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
            if top1 >= outcome.best_top1:
                outcome.best_top1, outcome.best_epoch = top1, epoch
            if state is not None and ranks.is_first():
                phase.save(state, epoch + 1, outcome, best)
            on_progress(phase.progress(epoch, phase.steps, loss, penalty, top1))
        if settings.keep_best and best is not None:
            model.load_state_dict(best)
        return outcome
    finally:
        phase.close()


class _Phase:
    """One phase's loop: the optimiser and what an epoch changes."""

    def __init__(
        self,
        model: nn.Module,
        train: Loader | Feed,
        settings: Settings,
        device: Accelerator,
        regularizers: Sequence[Regularizer],
        teacher: nn.Module | None,
    ) -> None:
        self.settings, self.device, self.regularizers, self.train = settings, device, regularizers, train
        self.model = model.to(device.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        teacher = teacher.to(device.device).eval() if teacher is not None and settings.distill > 0 else None
        self.steps = len(train)
        self.losses = Losses(self.model, settings, device, regularizers, teacher)
        self.taught: Tensor | None = None  # (images, classes): the teacher's outputs, asked once where they stay
        if teacher is not None and settings.epochs > 1 and isinstance(train, Loader) and train.is_still:
            # in a fixed order, so that a resumed run has the same
            self.taught = predict(teacher, train, device=device, task=settings.task)
        self.objective = shared(self.losses, device) if ranks.world() > 1 else self.losses
        self.best: dict[str, Tensor] | None = None
        self.optimizer = torch.optim.SGD(
            _parameter_groups(model, regularizers, settings),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            fused=True,
        )
        # a hook, so that masks (regularize/masks.py), which torch calls first, have been laid on what is measured here
        self._clipping = self.optimizer.register_step_pre_hook(lambda *_: self._clip())
        self._looks_always = device.device.type == "cpu" and ranks.world() == 1
        self.lambda_log: list[tuple[int, dict[str, float]]] = []
        self._guard = ExitStack()
        self._guard.enter_context(unstrided(self.model))
        self._rate = 0.0  # images per second, of all processes
        self._pace = 0.0  # steps per second

    def run_epoch(self, epoch: int, on_progress: Callable[[Progress], None], state: Path | None) -> tuple[float, float]:
        """One pass over the training images; mean task loss and mean penalty."""
        self.model.train()
        self.train.set_epoch(epoch)
        # dropout and the like, other on every rank
        torch.manual_seed((hash((self.settings.seed, epoch)) + ranks.rank()) & 0x7FFFFFFF)
        began, seen = time.perf_counter(), 0
        sums = torch.zeros(2, device=self.device.device)
        positions = self.train.positions() if self.taught is not None else ()
        for step, batch in enumerate(self.train):
            images, labels = self.settings.task.unpack(batch)
            if self.taught is not None:
                self.losses.taught = self.taught[positions[step].to(self.taught.device)]
            task, penalty = self._step(epoch * self.steps + step, images, labels)
            self._look(epoch * self.steps + step)
            seen += self.settings.task.size(labels)
            sums += torch.stack((task, penalty))
            # on a GPU, or among several processes, only every 16 steps: looking at the loss waits for them
            is_due = self._looks_always or step % 16 == 15 or step == self.steps - 1
            if is_due and not math.isfinite(float(ranks.averaged(sums).sum())):
                raise self.diverged(f"at epoch {epoch + 1}, step {step + 1} of {self.steps}", state)
            self._pace = (step + 1) / (time.perf_counter() - began)
            self._rate = ranks.world() * seen / (step + 1) * self._pace
            if step % 10 == 9:
                done = (sums / (step + 1)).tolist()
                on_progress(self.progress(epoch, step + 1, *done))
        ranks.from_first(self.model.buffers())  # batch norms judge by the same statistics everywhere
        loss, mean_penalty = (ranks.averaged(sums) / self.steps).tolist()
        return loss, mean_penalty

    def progress(self, epoch: int, step: int, loss: float, penalty: float, top1: float | None = None) -> Progress:
        left = ((self.settings.epochs - epoch) * self.steps - step) / max(self._pace, 1e-9)
        return Progress(epoch, self.settings.epochs, step, self.steps, loss, penalty, self._rate, left, top1)

    def calibrate(self) -> list[dict[str, float]]:
        """Scale each penalty to the wanted share of the task loss, over four batches; the network is left as it was.

        A network that fits its training images has a loss near 0, of which any share would do nothing: the task loss
        counts as at least a tenth of ln(classes), the loss of guessing. A penalty counts by its size, since an unbiased
        CKA may be below 0, and a negative strength would ask for what the method is against.
        """
        share = self.settings.penalty_share
        if share is None or share == 0 or len(self.settings.fixed) >= len(self.regularizers):
            return [numbers(r.state_dict()) for r in self.regularizers]
        before = {name: t.detach().clone() for name, t in self.model.named_buffers()}
        self.model.train()
        self.train.set_epoch(0)
        found = torch.zeros(1 + len(self.regularizers), dtype=torch.float64)
        with seeded(self.settings.seed):
            for batch in islice(self.train, 4):
                loss, _, penalties = self.losses.parts(*self.settings.task.unpack(batch))
                found[0] += max(float(loss.detach()), LEAST_LOSS * math.log(self.losses.classes))
                found[1:] += torch.tensor([abs(float(penalty.detach())) for penalty in penalties], dtype=torch.float64)
        task, *sizes = ranks.averaged(found).tolist()
        for place, (regularizer, size) in enumerate(zip(self.regularizers, sizes, strict=True)):
            if place in self.settings.fixed:
                continue
            if size == 0:
                raise PruneError(
                    f"{type(regularizer).__name__} finds nothing to penalise in this network (for FFR: no two features "
                    "of equal shape in a row); choose another method"
                )
            regularizer.scale_penalty(share * task / size)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
        return [numbers(r.state_dict()) for r in self.regularizers]

    def save(self, path: Path, epoch: int, outcome: Outcome, best: dict[str, Tensor] | None) -> None:
        """Everything the next epoch depends on, in one file that appears whole or not at all."""
        content = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizers": [r.state_dict() for r in self.regularizers],
            "kinds": [type(r).__name__ for r in self.regularizers],
            "options": [chosen(r) for r in self.regularizers],
            "begun": self._begun(),
            "outcome": vars(outcome),
            "best": best,
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    def restore(self, path: Path | None) -> tuple[Outcome, int]:
        """What `save` left and the epochs done; a fresh outcome and 0 where there is no such file."""
        found = ranks.first(lambda: path.read_bytes() if path is not None and path.exists() else b"")
        if not found:
            return Outcome(), 0
        content = torch.load(io.BytesIO(found), map_location="cpu", weights_only=True)
        for name, value in self._begun().items():
            if content.get("begun", {}).get(name, value) != value:
                before = content["begun"][name]
                raise UsageError(f"the state was left by a training with {name} = {before}, not {value}; begin anew")
        self._check_methods(content)
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            for regularizer, of_it in zip(self.regularizers, content["regularizers"], strict=True):
                regularizer.load_state_dict(of_it)
        except (RuntimeError, ValueError) as error:
            raise UsageError("the state was left by the training of another network; begin anew") from error
        for parameter, kept in self.optimizer.state.items():  # the fused step goes through both as they lie in memory
            kept.update(
                {k: torch.empty_like(parameter).copy_(v) for k, v in kept.items() if v.shape == parameter.shape}
            )
        self.best = content["best"]
        log.info("resumed at epoch %d of %d", content["epoch"], self.settings.epochs)
        return Outcome(**content["outcome"]), int(content["epoch"])

    def _check_methods(self, content: dict[str, Any]) -> None:
        """UsageError unless a state is that of the same regularisers with the same options."""
        kinds = [type(r).__name__ for r in self.regularizers]
        if content.get("kinds", kinds) != kinds:
            begun, asked = (", ".join(names) or "no regulariser" for names in (content["kinds"], kinds))
            raise UsageError(f"the state was left by a training with {begun}, not {asked}; begin anew or name the same")
        for regularizer, begun_with in zip(self.regularizers, content.get("options", ()), strict=False):
            for name, own in chosen(regularizer).items():
                if begun_with.get(name, own) != own:
                    raise UsageError(
                        f"the state was left by a training whose {type(regularizer).__name__} had {name} = "
                        f"{begun_with[name]}, not {own}; begin anew or give the same"
                    )

    def _begun(self) -> dict[str, float]:
        """What the epochs done and those to come must have in common."""
        kept = ("epochs", "lr", "momentum", "weight_decay", "warmup", "label_smoothing", "distill", "temperature")
        return {name: getattr(self.settings, name) for name in (*kept, "seed")} | {"steps of an epoch": self.steps}

    def close(self) -> None:
        """Leave a plain module behind, without the wrapper of several processes."""
        self._clipping.remove()
        self._guard.close()
        self.objective = self.losses
        self.model._compiled_call_impl = None
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    def _step(self, step: int, images: Example, labels: Any) -> tuple[Tensor, Tensor]:
        begin, end = self.settings.span
        done = begin + (end - begin) * step / (self.settings.epochs * self.steps)
        rate = self.settings.lr * schedule(done, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total, task, extra = self.objective(images, labels)
        self.device.backward(total)
        self.optimizer.step()
        for regularizer in self.regularizers:
            regularizer.after_step()
        return task, extra

    def _look(self, step: int) -> None:
        total = self.settings.epochs * self.steps
        if (step % max(1, total // LAMBDAS) == 0 or step == total - 1) and (found := lambdas(self.regularizers)):
            self.lambda_log.append((step + 1, found))

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)

    def diverged(self, where: str, state: Path | None) -> DivergedError:
        """What to say of a NaN or infinite loss; nothing has been saved since the last good epoch."""
        is_saved = ranks.first(lambda: state is not None and state.exists())
        kept = "the last good epoch is kept" if is_saved else "nothing had been saved yet"
        return DivergedError(
            f"the loss became NaN or infinite in {self.settings.phase} {where}; {kept}; start again with a lower "
            "train.lr or prune.penalty_share (--set train.lr=0.01)"
        )


def _parameter_groups(
    model: nn.Module, regularizers: Sequence[Regularizer], settings: Settings
) -> list[dict[str, Any]]:
    """Matrices and filters decay; vectors (norms, biases) do not; a regulariser's own parameters decay as it says."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    for regularizer in regularizers:
        own = list(regularizer.parameters())
        if own:
            groups.append({"params": own, "weight_decay": getattr(regularizer, "lambda_weight_decay", 0.0)})
    return [group for group in groups if group["params"]]
