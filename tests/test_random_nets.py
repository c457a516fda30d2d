"""Random networks, random cuts: pruned == zeroed == built at that width; and a fresh process finds them the same."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.checkpoint import ModelInfo, save
from compress.cli import arch
from compress.groups import Group, cut, trace, zero
from compress.groups.trace import find
from compress.inputs import noise
from compress.structure import underived
from tests.nets import lively
from tests.random_nets import KINDS, build, rebuild

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sliced(model: nn.Module, groups: tuple[Group, ...], kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights that stay, index by index."""
    stays = {name: [[True] * n for n in value.shape] for name, value in model.state_dict().items()}
    for group in groups:
        for part in group.slices:
            for channel in set(range(group.size)) - set(kept.get(group.name, range(group.size))):
                for index in range(part.block):
                    stays[part.name][part.dim][part.offset + channel * part.block + index] = False
    found = {}
    for name, value in model.state_dict().items():
        for dim, marks in enumerate(stays[name]):
            value = value[(slice(None),) * dim + (torch.tensor(marks),)]
        found[name] = value
    return found


@settings(max_examples=9, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    width=st.sampled_from([8, 12]),
    seed=st.integers(0, 2**20),
)
@example(kinds=list(KINDS), width=8, seed=0)
def test_every_cut_keeps_the_laws(kinds: list[str], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = lively(build(kinds, width), seed).double()
    groups = trace(model, X)
    assert [g.frozen for g in groups if g.frozen] == ["its channels reach the output"], groups
    kept = {}
    for group in groups[:-1]:
        number = int(torch.randint(1, group.size + 1, ()))
        kept[group.name] = sorted(torch.randperm(group.size)[:number].tolist())
    _, mixed = find(model, X)
    local = {name: channels for name, channels in kept.items() if name not in mixed}
    zeroed, pruned = copy.deepcopy(model), copy.deepcopy(model)
    zero(zeroed, groups, local)
    cut(pruned, groups, local)
    with torch.no_grad():
        a, b = zeroed(X), pruned(X)
    assert (a - b).abs().max() <= 1e-10 * max(1, a.abs().max())
    both = copy.deepcopy(model)
    cut(both, groups, kept)
    built = rebuild(both).double().eval()
    built.load_state_dict(sliced(model, groups, kept))
    with torch.no_grad():
        assert torch.equal(built(X), both(X))


VIT = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 4, "num_classes": 5}
SAVED = {  # architecture -> its arguments, and the side of its images
    **{
        kind: ("tests.random_nets:single", {"kind": kind}, 8)
        for kind in ("plain", "residual", "concat", "split", "attention", "grouped")
    },
    "vit": ("timm:vit_tiny_patch16_224", VIT, 32),
}
CHILD = """
import sys
sys.modules["torch_pruning"] = None  # an import of it fails
from pathlib import Path
import safetensors.torch, torch
import tests.conftest
from compress.checkpoint import load_into, read
from compress.cli import arch
from compress.inputs import noise
answers = {}
for path in Path(sys.argv[1]).glob("*.safetensors"):
    found = read(path)
    model = arch.resolve(found.info.arch, {}, found).model.eval()
    load_into(model, found)
    with torch.no_grad():
        answers[path.stem] = model(noise(found.info.input_size, 2))
safetensors.torch.save_file(answers, sys.argv[2])
"""


def test_every_kind_loads_in_a_fresh_process_without_torch_pruning(tmp_path: Path, root: Path) -> None:
    pytest.importorskip("timm")
    wanted = {}
    (tmp_path / "saved").mkdir()
    for kind, (name, kwargs, side) in SAVED.items():
        torch.manual_seed(0)
        dense = lively(arch.resolve(name, kwargs, None).model)
        images = noise((3, side, side), 2)
        groups = trace(dense, images[:1])
        model = copy.deepcopy(dense)
        cut(model, groups, {g.name: range(0, g.size, 2) for g in groups if g.frozen is None})
        assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in dense.parameters()), kind
        info = ModelInfo(arch=name, arch_kwargs=kwargs, pruned=True, input_size=(3, side, side))
        save(tmp_path / "saved" / f"{kind}.safetensors", model, info, integers=underived(model, dense))
        with torch.no_grad():
            wanted[kind] = model(images)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path / "saved", tmp_path / "answers.safetensors"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = safetensors.torch.load_file(tmp_path / "answers.safetensors")
    assert found.keys() == wanted.keys()
    assert [kind for kind, answer in wanted.items() if not torch.equal(answer, found[kind])] == []
