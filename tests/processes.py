"""What every process of a torchrun does in tests/test_distributed.py: laws that need two; each writes what it found."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from compress import ranks
from compress.cost import measure
from compress.data import Loader, load, loader
from compress.errors import CompressError, DivergedError, ElsewhereError, UsageError
from compress.groups import trace
from compress.plan import apply, select
from compress.regularize import REGULARIZERS, Ffr, Ggr, Halo, Regularizer, Rigl, SetTraining
from compress.regularize.sparse_training import SparseTraining
from compress.train import Settings, accelerator, evaluate, finetune, recalibrate
from tests.nets import NETS

MADE: dict[str, Callable[[], Regularizer]] = {
    **REGULARIZERS,
    "halo by sgd": lambda: Halo(solver="sgd", xi=1e-3),
    "ffr by flow": lambda: Ffr(score="flow", period=1),
    # the topology changes after the first and the second of three steps
    "ggr": lambda: Ggr(density=0.3, interval=1),
    "rigl": lambda: Rigl(density=0.3, interval=1),
    "set": lambda: SetTraining(density=0.3, interval=1),
}
EXAMPLE = torch.zeros(1, 3, 8, 8)
SETTINGS = Settings(epochs=3, lr=0.02, seed=3, penalty_share=0.5, keep_best=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Equal for tensors that are equal to the last bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Other images on every rank."""
    generator = torch.Generator().manual_seed(100 * step + ranks.rank())
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def bare_loop(name: str) -> dict[str, str]:
    """A loop of one's own: wrap, train, score, cut, wrap again, train on."""
    torch.manual_seed(ranks.rank())  # other weights on every rank, until the wrapper makes them equal
    model, regularizer = NETS["residual"](), MADE[name]()
    groups = trace(model, EXAMPLE)
    regularizer.attach(model, groups)
    steps(model, regularizer, range(3))
    scores = regularizer.scores()
    found = {"scores": digest(scores), "trained": digest(model.state_dict())}
    found["chosen"] = str(regularizer.state_dict().get("chosen"))
    if isinstance(regularizer, SparseTraining):
        found |= {"masks": digest(regularizer.masks.alive), "changes": str(len(regularizer.density_log) - 1)}
    regularizer.detach()
    costs = measure(model, EXAMPLE)
    apply(model, groups, select(groups, scores, costs, keep=0.5, round_to=1))
    steps(model, None, range(3, 5))
    return {**found, "cut": digest(dict(model.named_parameters()))}


def steps(model: nn.Module, regularizer: Regularizer | None, numbers: range) -> None:
    wrapped = DistributedDataParallel(model.train())
    own = list(regularizer.parameters()) if regularizer else []
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *([{"params": own}] if own else [])], lr=0.01)
    for step in numbers:
        images, labels = batch(step)
        loss = F.cross_entropy(wrapped(images), labels)
        loss = loss + regularizer.penalty() if regularizer else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if regularizer:
            regularizer.after_step()
    ranks.from_first(model.buffers())


def penalty_gradient(name: str) -> float:
    """How far the gradient of a penalty under the wrapper is from the mean of all processes' own ones."""

    def gradients(is_wrapped: bool) -> Tensor:
        torch.manual_seed(0)
        model, regularizer = NETS["residual"]().double(), MADE[name]()
        regularizer.attach(model, trace(model, EXAMPLE.double()))
        called = DistributedDataParallel(model) if is_wrapped else model  # kept until the backward pass
        output = called(batch(0)[0].double())
        (regularizer.penalty() + 0 * output.sum()).backward()
        return torch.cat([p.grad.flatten() if p.grad is not None else 0 * p.flatten() for p in model.parameters()])

    expected = ranks.averaged(gradients(False))
    assert torch.isfinite(expected).all()
    return float((gradients(True) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


class Awkward(nn.Module):
    """A layer that nothing reaches and one that does not learn, and no batch norm, so that shares add up."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = NETS["plain"](), nn.Conv2d(3, 3, 1)
        self.net[2].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Laws:
    """Training as in a run."""

    def __init__(self, out: Path) -> None:
        self.out, self.device, self.digits = out, accelerator("cpu", "fp32"), load("digits", image_size=8, seed=0)

    def batches(self, *, train: bool) -> Loader:
        return loader(
            self.digits.train if train else self.digits.val,
            train=train, augment="none", batch_size=ranks.share(128), mean=(0.3,) * 3, std=(0.35,) * 3,
            rank=ranks.rank(), world=ranks.world(),
        )  # fmt: skip

    def train(self, model: nn.Module, name: str | None, settings: Settings = SETTINGS, **more: Any) -> dict[str, Any]:
        made = [MADE[name]()] if name else []
        for regularizer in made:
            regularizer.attach(model, trace(model, EXAMPLE))
        train, val = self.batches(train=True), self.batches(train=False)
        outcome = finetune(model, train, val, settings, device=self.device, regularizers=made, **more)
        found = {
            "history": [{k: v for k, v in line.items() if k != "seconds"} for line in outcome.history],
            "strengths": outcome.strengths,
            "weights": digest(model.state_dict()),
            "scores": [digest(regularizer.scores()) for regularizer in made],
        }
        for regularizer in made:
            regularizer.detach()
        return found

    def shares_add_up(self) -> dict[str, float]:
        """The largest difference between weights that two processes trained and those that one trained alone."""
        found = {}
        for name in (None, "lasso", "halo by sgd"):
            torch.manual_seed(0)
            model = Awkward()
            alone = copy.deepcopy(model)
            self.train(model, name)
            ranks.first(lambda alone=alone, name=name: self.train(alone, name))
            ranks.from_first(alone.state_dict().values())
            pairs = zip(model.parameters(), alone.parameters(), strict=True)
            found[str(name)] = max(float((a - b).abs().max().detach()) for a, b in pairs)
            assert "forward" not in vars(model) and not any(p.grad is not None for p in model.parameters())
            copy.deepcopy(model)
        return found

    def resumed(self) -> dict[str, Any]:
        """Unbroken, and stopped after two of three epochs and taken up again by a network with other weights."""

        def network(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return NETS["residual"]()

        def stop(progress: Any) -> None:
            if progress.top1 is not None and progress.epoch == 1:
                raise KeyboardInterrupt

        whole = self.train(network(0), "cka-sr", state=self.out / "whole.pt")
        try:
            self.train(network(0), "cka-sr", state=self.out / "broken.pt", on_progress=stop)
            raise AssertionError("it was not stopped")
        except KeyboardInterrupt:
            pass
        return {"whole": whole, "resumed": self.train(network(1), "cka-sr", state=self.out / "broken.pt")}

    def judged(self) -> dict[str, Any]:
        """Evaluation in shares and by one process alone, after a recalibration."""
        torch.manual_seed(0)
        model = NETS["residual"]()
        recalibrate(model, self.batches(train=True), device=self.device, batches=3)

        def alone() -> tuple[float, float]:
            return evaluate(model, self.batches(train=False), device=self.device)

        return {
            "images": len(self.digits.val),
            "together": alone(),
            "alone": ranks.first(alone),
            "statistics": digest(model.state_dict()),
        }

    def diverged(self) -> str:
        """One process sees a NaN; all stop."""
        inner = self.batches(train=True)

        class Poisoned:
            set_epoch = inner.set_epoch

            def __len__(self) -> int:
                return len(inner)

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return ((images * math.nan if ranks.rank() == 1 else images, labels) for images, labels in inner)

        settings = replace(SETTINGS, penalty_share=None)
        try:
            finetune(NETS["plain"](), Poisoned(), self.batches(train=False), settings, device=self.device)  # type: ignore[arg-type]
        except DivergedError as error:
            return str(error)
        return "nothing"


def failure() -> str:
    """What is raised here when rank 0's work fails."""

    def work() -> None:
        assert ranks.world() == 1  # nobody else is in it
        raise UsageError("as it is said there")

    try:
        ranks.first(work)
    except CompressError as error:
        assert isinstance(error, UsageError if ranks.is_first() else ElsewhereError)
        return f"{error}: {error.exit_code}"
    return "nothing"


def refusal(batch_size: int) -> str:
    try:
        return str(ranks.share(batch_size))
    except UsageError as error:
        return str(error)


def threads() -> list[str]:
    """The names of this process's threads, where the system tells them."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def main(out: Path) -> None:
    laws = Laws(out)
    found = {
        "rank": ranks.rank(),
        "told": ranks.first(lambda: {"rank": ranks.rank(), "pair": [1, 2.5, None]}),
        "bytes": ranks.first(lambda: b"\x00\xff").hex(),
        "averaged": ranks.averaged(torch.tensor([float(ranks.rank()), 5.0])).tolist(),
        "failure": failure(),
        "refusals": [refusal(128), refusal(127), refusal(2)],
        "loops": {name: bare_loop(name) for name in MADE},
        "gradients": {name: penalty_gradient(name) for name in MADE},
        "add up": laws.shares_add_up(),
        **laws.resumed(),
        "judged": laws.judged(),
        "diverged": laws.diverged(),
    }
    found["threads together"] = threads()
    ranks.leave()
    found["threads alone"] = threads()
    (out / f"{found['rank']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
