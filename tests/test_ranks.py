"""Two processes that start from different weights and seeds end with the same topology and the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK = """
import sys, torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from compress.regularize import Ggr
from tests.nets import residual

folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(rank)
model = residual()
ggr = Ggr(density=0.2, interval=3, seed=rank, weights="random")
wrapped = DistributedDataParallel(model)
ggr.attach(model, ())
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for _ in range(8):
    optimizer.zero_grad()
    F.cross_entropy(wrapped(torch.randn(4, 3, 8, 8)), torch.randint(0, 10, (4,))).backward()
    optimizer.step()
    ggr.after_step()
weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
torch.save({"masks": ggr.masks.state_dict(), "weights": weights}, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_topologies_agree(tmp_path: Path, root: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, tmp_path, str(rank)], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("masks", "weights"):
        assert one[part].keys() == two[part].keys() and len(one[part]) > 5
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in one[part].items())
    assert all(not one["weights"][name][~mask].any() for name, mask in one["masks"].items())
