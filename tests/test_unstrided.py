"""Strided 1 x 1 convolutions of few inputs: what they give stays, and their gradients are right on every processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.groups import trace
from compress.scores import SCORES
from compress.train import Settings, accelerator, finetune
from compress.train.feed import Feed
from compress.unstrided import is_affected, unstrided

GRADIENTS = """
import sys, torch
from torch import nn
from compress.unstrided import unstrided
torch.set_num_threads(int(sys.argv[1]))
for inputs in (1, 3, 5, 7, 9):
    torch.manual_seed(inputs)
    layer = nn.Conv2d(inputs, 6, 1, 2, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(64, inputs, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    with unstrided(layer):
        given = layer(images)
    toward = torch.randn_like(given)
    found = torch.autograd.grad(given, [images, layer.weight], toward)
    exact = [tensor.detach().double().requires_grad_() for tensor in (images, layer.weight)]
    right = torch.autograd.grad(nn.functional.conv2d(exact[0], exact[1], None, 2), exact, toward.double())
    for one, other in zip(found, right):
        assert (one - other).norm() < 1e-5 * other.norm(), (inputs, (one - other).norm(), other.norm())
print("right")
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_gradients_are_right_with_the_instructions_of_other_processors(isa: str, threads: int, root: Path) -> None:
    """In a process of its own, which a wrong gradient may take with it."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", GRADIENTS, str(threads)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stderr


class Noting(nn.Conv2d):
    """Notes the stride it runs with, and how large its images are."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.stride, images.shape[-1]))
        return super().forward(images)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), Noting(5, 8, 1, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def test_it_gives_the_same_and_is_as_before_afterwards() -> None:
    model, images = net().double(), torch.randn(2, 3, 9, 7).double()
    before = model(images)
    watched: list[tuple[int, ...]] = []
    handles = [model[2].register_forward_pre_hook(lambda layer, inputs: watched.append(inputs[0].shape))]
    with unstrided(model):
        assert torch.allclose(model(images), before, rtol=1e-10)
        with pytest.raises(RuntimeError):
            model[2](torch.randn(2, 4, 9, 9).double())
        assert model[2].stride == (2, 2) and torch.allclose(model(images), before, rtol=1e-10)
    assert [shape[1:] for shape in watched] == [(5, 9, 7), (4, 9, 9), (5, 9, 7)]  # others see the whole input
    assert {stride for stride, _ in model[2].seen[1:]} == {(1, 1)}
    handles[0].remove()
    assert torch.equal(model(images), before) and model[2].seen[-1] == ((2, 2), 7)
    assert not model[2]._forward_hooks and not model[2]._forward_pre_hooks


def test_only_what_has_few_inputs_a_stride_and_learns() -> None:
    assert is_affected(nn.Conv2d(15, 4, 1, 2)) and is_affected(nn.Conv2d(3, 4, 1, (1, 2)))
    assert is_affected(nn.Conv2d(32, 32, 1, 2, groups=4))
    for other in (nn.Conv2d(16, 4, 1, 2), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, 2), nn.Conv2d(3, 4, 1, 2, padding=1)):
        assert not is_affected(other)
    assert not is_affected(nn.Conv2d(3, 4, 1, 2).requires_grad_(False)) and not is_affected(nn.Linear(3, 4))


def test_training_and_scores_by_gradients_go_this_way() -> None:
    model = net()
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2)]
    finetune(model, Feed(batches), Feed(batches[:1]), Settings(epochs=1), device=accelerator("cpu"))
    learned = [stride for stride, _ in model[2].seen]
    assert learned[:2] == [(1, 1)] * 2 and model[2].stride == (2, 2)
    groups = trace(model, batches[0][0][:1])
    for name, options in (("taylor", {"loss": F.cross_entropy}), ("hessian", {"loss": F.cross_entropy}), ("obd-c", {})):
        model[2].seen.clear()
        SCORES[name](model, groups, batches, **options)
        assert model[2].seen and all(stride == (1, 1) for stride, _ in model[2].seen)
