"""Tasks: losses and metrics against sums by hand, and networks of each task trained, cut and evaluated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import UsageError
from compress.shrinking import shrink
from compress.task import IGNORED, TASKS, Classification, Segmentation, Task, check
from compress.train import Feed, Settings, accelerator, evaluate, finetune, recalibrate
from tests.test_example import Parts, Two

DRAWN = torch.Generator().manual_seed(0)
LOGITS = torch.randn(4, 5, 6, 7, generator=DRAWN, dtype=torch.float64)
MASKS = torch.where(
    torch.rand(4, 6, 7, generator=DRAWN) < 0.2, IGNORED, torch.randint(0, 4, (4, 6, 7), generator=DRAWN)
)


class Distance:
    """A task of one's own: two inputs, a vector to come near to, and the share that comes within 1 of it."""

    name, metric = "distance", "near"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        return (batch["images"], batch["points"]), batch["wanted"]

    def logits(self, output: Any) -> Tensor:
        found: Tensor = output
        return found

    def loss(self, logits: Tensor, targets: Any, *, label_smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(logits, targets)

    def count(self, logits: Tensor, targets: Any) -> Tensor:
        near = (logits - targets).norm(dim=1) < 1
        return torch.stack((near.sum(), torch.tensor(len(targets)))).double()

    def value(self, counts: Tensor) -> float:
        return float(100 * counts[0] / counts[1])

    def size(self, targets: Any) -> int:
        return len(targets)


def _brute_force() -> tuple[float, float]:
    """Mean loss and mean intersection over union, pixel by pixel."""
    losses, both, either = [], [0] * 5, [0] * 5
    for n, h, w in ((n, h, w) for n in range(4) for h in range(6) for w in range(7)):
        true = int(MASKS[n, h, w])
        if true == IGNORED:
            continue
        row = LOGITS[n, :, h, w]
        losses.append(math.log(sum(math.exp(float(v)) for v in row)) - float(row[true]))
        found = max(range(5), key=lambda k: float(row[k]))
        both[true] += found == true
        for k in {true, found}:
            either[k] += 1
    shares = [b / e for b, e in zip(both, either, strict=True) if e]
    return sum(losses) / len(losses), 100 * sum(shares) / len(shares)


def test_segmentation_by_hand() -> None:
    task = Segmentation()
    loss, miou = _brute_force()
    assert float(task.loss(LOGITS, MASKS)) == pytest.approx(loss, rel=1e-10)
    parts = [task.count(LOGITS[half], MASKS[half]) for half in (slice(0, 1), slice(1, 4))]
    assert task.value(parts[0] + parts[1]) == pytest.approx(miou, rel=1e-10)
    assert float(task.loss(LOGITS, torch.full_like(MASKS, IGNORED))) == 0
    assert torch.equal(task.logits({"out": LOGITS, "aux": MASKS}), LOGITS)
    with pytest.raises(UsageError, match="a mask holds class 9; allowed are 0 to 4, and 255"):
        task.count(LOGITS, torch.full_like(MASKS, 9))


def test_classification_by_hand() -> None:
    task, logits, labels = Classification(), LOGITS[:, :, 0, 0], torch.tensor([0, 4, 2, 1])
    right = sum(int(row.argmax() == label) for row, label in zip(logits, labels, strict=True))
    assert task.value(task.count(logits, labels)) == 25 * right
    smooth = task.loss(logits, labels, label_smoothing=0.1)
    each = torch.logsumexp(logits, 1) - 0.9 * logits[range(4), labels] - 0.02 * logits.sum(1)
    assert float(smooth) == pytest.approx(float(each.mean()), rel=1e-10)


def test_evaluation_counts_every_image_once() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    batches = Feed([(LOGITS[:3], MASKS[:3]), (LOGITS[3:], MASKS[3:])])
    miou, _ = evaluate(Same(), batches, device=accelerator("cpu", "fp32"), task=Segmentation())
    assert miou == pytest.approx(_brute_force()[1], rel=1e-10)


def _segments() -> list[tuple[Tensor, Tensor]]:
    """Images whose pixels are of the class that their brightest channel tells."""
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(images[..., ::4, ::4], (8, 8))
    masks = images.argmax(1)
    masks[:, 0] = IGNORED
    return list(DataLoader(TensorDataset(images, masks), batch_size=8))


def _points() -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(2)
    points = torch.randn(4, 8, 5, generator=drawn)
    return [
        {"images": torch.randn(8, 3, 8, 8, generator=drawn), "points": p, "wanted": p[:, :4].sign()} for p in points
    ]


@pytest.mark.parametrize(
    ("model", "batches", "task", "gain"), [(Parts, _segments, Segmentation(), 20), (Two, _points, Distance(), 20)]
)
def test_a_network_is_trained_cut_and_taught(model: Any, batches: Any, task: Task, gain: float) -> None:
    torch.manual_seed(0)
    dense, given, device = model(), batches(), accelerator("cpu", "fp32")
    before, _ = evaluate(dense, given, device=device, task=task)
    settings = Settings(epochs=40, lr=0.05, task=task, keep_best=True)
    outcome = finetune(dense, Feed(given), Feed(given), settings, device=device)
    found, loss = evaluate(dense, given, device=device, task=task)
    assert found == outcome.best_top1 >= before + gain and math.isfinite(loss)
    torch.manual_seed(0)
    small = model()
    small.load_state_dict(dense.state_dict())
    shrink(small, task.unpack(given[0])[0], keep=0.6, round_to=1)
    recalibrate(small, given, device=device, task=task)
    cut, _ = evaluate(small, given, device=device, task=task)
    taught = Settings(epochs=10, lr=0.05, task=task, keep_best=True, distill=0.5 if task.name == "segmentation" else 0)
    outcome = finetune(small, Feed(given), Feed(given), taught, device=device, teacher=dense)
    assert outcome.best_top1 >= cut


def test_what_is_no_task() -> None:
    assert all(check(build(), name) for name, build in TASKS.items()) and check(Distance(), "mine")
    with pytest.raises(
        UsageError, match=r"a\.py:Mine is no task: it has no unpack, logits, loss, count, value, size; see"
    ):
        check(type("Mine", (), {"name": "a", "metric": "b"})(), "a.py:Mine")
