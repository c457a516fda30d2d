"""MACs equal the formulas done by hand, and the cost at other widths equals the cost of the network cut to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.cost import METRICS, Widths, by_layer, measure
from compress.errors import PruneError
from compress.groups import cut, trace
from tests.nets import NETS, Tied


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 8 * 3 * 9 * 10 * 12),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 10, 12), 8 * 3 * 9 * 5 * 6),
        (nn.Conv2d(6, 8, (3, 1), groups=2), (6, 9, 9), 8 * 3 * 3 * 7 * 9),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (6, 5, 5), 6 * 9 * 25),
        (nn.Conv2d(3, 4, 3, dilation=2), (3, 9, 9), 4 * 3 * 9 * 5 * 5),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 7), 4 * 6 * 4 * 5 * 7),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 7), 4 * 3 * 9 * 5 * 7),
        (nn.Conv1d(3, 5, 3), (3, 20), 5 * 3 * 3 * 18),
        (nn.Conv3d(2, 3, 3), (2, 5, 5, 5), 3 * 2 * 27 * 27),
        (nn.Linear(12, 7), (12,), 12 * 7),
        (nn.Linear(12, 7, bias=False), (5, 12), 5 * 12 * 7),
    ],
)
@pytest.mark.parametrize("images", [1, 3])
def test_macs_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int, images: int) -> None:
    costs = measure(layer, torch.randn(images, *shape))
    assert costs.total("macs") == macs
    assert costs.total("params") == sum(p.numel() for p in layer.parameters())
    assert costs.total("size") == 4 * costs.total("params")


def test_resnet20_by_hand() -> None:
    from compress.models import ARCHS

    stem, first = 3 * 16 * 9 * 32 * 32, 6 * 16 * 16 * 9 * 32 * 32
    second = (16 * 32 + 5 * 32 * 32) * 9 * 16 * 16
    third = (32 * 64 + 5 * 64 * 64) * 9 * 8 * 8
    shortcuts = 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8  # the fixed selections are computed, though not learned
    costs = measure(ARCHS["resnet20"](), torch.randn(1, 3, 32, 32))
    assert costs.total("macs") == stem + first + second + third + 640 + shortcuts
    assert costs.total("params") == 269_722  # as published with the checkpoints


def test_products_of_two_activations_count_but_belong_to_no_layer() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, x.transpose(1, 2))

    costs = measure(Attention(), torch.randn(2, 5, 7))
    assert costs.total("macs") == costs.fixed["macs"] == 5 * 5 * 7


def test_an_operator_without_a_rule_is_named() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert any("attention" in name for name in measure(Fused(), torch.randn(1, 2, 4, 8)).unknown)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_cost_at_widths_is_the_cost_after_the_cut(name: str, metric: str) -> None:
    model = NETS[name]().eval()
    x = torch.randn(1, 3, 16, 16)
    groups, costs = trace(model, x), measure(model, x)
    widths = Widths(groups, costs, metric)  # type: ignore[arg-type]
    assert widths.total() == costs.total(metric)  # type: ignore[arg-type]
    kept = {g.name: range(max(1, g.size // 3)) for g in groups if g.frozen is None}
    for group, channels in kept.items():
        before = widths.total()
        change = widths.change(group, len(channels))
        widths.kept[group] = len(channels)
        assert before - widths.total() == pytest.approx(change)
    smaller = copy.deepcopy(model)
    cut(smaller, groups, kept)
    assert widths.total() == measure(smaller, x).total(metric)  # type: ignore[arg-type]


def test_layers_add_up() -> None:
    model = NETS["residual"]().eval()
    costs = measure(model, torch.randn(1, 3, 16, 16))
    assert sum(by_layer(costs, "macs").values()) == costs.total("macs")
    assert by_layer(costs, "macs")["0"] == 8 * 3 * 9 * 256


def test_measuring_leaves_the_mode() -> None:
    model = NETS["residual"]().train()
    measure(model, torch.randn(1, 3, 16, 16))
    assert model.training
    with pytest.raises(PruneError, match=r"does not run on shape \(1, 4, 8, 8\)"):
        measure(model, torch.randn(1, 4, 8, 8))


def test_a_tied_layer_costs_once_and_computes_twice() -> None:
    model = Tied().eval()
    costs = measure(model, torch.randn(1, 3, 8, 8))
    layer = 8 * 8 * 9 + 8
    assert costs.total("params") == sum(p.numel() for p in model.parameters()) == 3 * 8 * 9 + 8 + layer + 36
    assert costs.total("size") == 4 * costs.total("params")
    assert costs.total("macs") == 64 * (3 * 8 * 9 + 2 * 8 * 8 * 9) + 32


def test_batch_norm_counts_one_vector_of_bytes_as_an_exported_file_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    costs = measure(model, torch.randn(1, 3, 2, 2))
    assert costs.total("size") == 4 * (12 + 4) and costs.total("params") == 12 + 8
