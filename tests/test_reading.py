"""What a layer reads, row by row, is what its weight turns into what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.groups.reading import channels, has_windows, windows

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1, bias=False), (2, 3, 9)),
    "stride, dilation": (nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 3), (1, 2), bias=False), (2, 3, 9, 11)),
    "same": (nn.Conv2d(3, 4, 5, padding="same", bias=False), (2, 3, 7, 7)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), (2, 3, 7, 7)),
    "3d": (nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_is_what_the_layer_gives(name: str) -> None:
    layer, shape = LAYERS[name]
    layer, x = layer.double(), torch.randn(shape).double()
    assert has_windows(layer)
    found = windows(layer, x) @ layer.weight.detach().flatten(1).T
    assert torch.allclose(found, layer(x).movedim(1, -1).reshape(len(found), -1), rtol=1e-10)


def test_places_that_are_drawn_are_the_same_whatever_the_channels() -> None:
    """So that what a cut network reads can be held against what the dense one reads."""
    wide, narrow = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    x = torch.randn(3, 6, 8, 8)
    rows, fewer = windows(wide, x, rows=50), windows(narrow, x[:, :4], rows=50)
    assert rows.shape == (50, 54) and torch.equal(rows[:, : 4 * 9], fewer)
    every = windows(wide, x)
    assert all(bool((every == row).all(1).any()) for row in rows)
    assert torch.equal(channels(wide, x, rows=50)[:, :4], channels(narrow, x[:, :4], rows=50))


class PadsItself(nn.Conv2d):
    """As in timm, where the padding follows the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def test_layers_that_show_their_channels_alone() -> None:
    others: list[Any] = [
        nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3), nn.Conv2d(300, 2, 3), nn.Conv2d(4, 2, 1),
        nn.Linear(4, 2), PadsItself(4, 2, 3),
    ]  # fmt: skip
    assert not any(has_windows(layer) for layer in others)
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert channels(nn.Conv2d(2, 3, 1), x).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert channels(nn.Linear(2, 3), x).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
