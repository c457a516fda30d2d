"""What makes a file slow, one function each: it looks at the evidence and tells a finding, or that there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from compress.doctor import alone, trials
from compress.doctor.layers import Layer, denormal_activations, denormal_weights, layers
from compress.doctor.profile import Asked, Node, Profile

WASTED = 0.05  # a layer alone has to gain as much from an aligned width
RESOLVED = 2e-3  # ms: two of the profiler's microseconds
NOTABLE = 0.02  # of an inference: smaller gains are no finding
CONVERTING = ("Reorder", "Transpose", "Cast", "Memcpy", "QuantizeLinear", "DequantizeLinear")
CONVERTED = 0.05  # of the operators' time
LOW = 2.0  # MACs per byte: a depthwise convolution of 3x3 has 1.1, any other of 16 channels or more 9 and above
BOUND = 0.25  # of the operators' time in such operators
OVERHEAD = 0.25  # of an inference between operators or in their fixed cost
TINY = 3.0  # times that fixed cost: an operator that takes less is bound by it and by nothing else


class Finding(BaseModel, frozen=True, extra="forbid"):
    """One cause. `gain_ms` per inference: `measured` by a trial, or an `estimate`, whose text says how it was made."""

    kind: str
    text: str
    gain_ms: float
    share: float  # gain_ms of the latency, 0 to 1
    basis: Literal["measured", "estimate"]
    remedy: str
    details: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """A file and its profile; `floor_ms`: what an operator takes that does nothing; `available`: providers here."""

    path: Path
    asked: Asked
    given: Mapping[str, Any]
    profile: Profile
    block: int
    floor_ms: float
    available: Sequence[str]

    def finding(self, kind: str, text: str, gain: float, **rest: Any) -> Finding:
        return Finding(kind=kind, text=text, gain_ms=gain, share=gain / self.profile.latency_ms, **rest)

    @property
    def is_on_cpu(self) -> bool:
        return all(node.provider == "CPUExecutionProvider" for node in self.profile.nodes)

    def share(self, nodes: Sequence[Node]) -> float:
        """Of the operators' time."""
        return _sum(nodes) / max(_sum(self.profile.nodes), 1e-9)

    def part(self, nodes: Sequence[Node]) -> float:
        """What these operators take of an inference: their share of its time, without the profiler's own."""
        return self.share(nodes) * self.profile.latency_ms


def fallback(evidence: Evidence) -> Finding | None:
    """Operators that ran on another provider than the one asked for."""
    asked, found = evidence.profile.asked, evidence.profile
    away = [node for node in found.nodes if node.provider != asked]
    if not away:
        return None
    if asked not in evidence.available:
        why = f"it is not in the installed onnxruntime, which has {', '.join(evidence.available)}"
        remedy = f"install a build of onnxruntime that has {asked}, or ask for a provider that is here"
    elif asked not in found.providers:
        why, remedy = "it is installed but did not start", "see that its libraries and its device are there"
    else:
        why = "it does not take these operators"
        remedy = "replace them by ones that it takes, or ask for the provider that they ran on"
    places = ", ".join(sorted({node.provider for node in away}))
    text = f"{len(away)} of {len(found.nodes)} operators ran on {places}, not on {asked}: {why}"
    rows = tuple({"name": node.name, "op": node.op, "provider": node.provider, "ms": node.ms} for node in away)
    bound = "; the gain is at most the time that they take"
    return evidence.finding(
        "fallback", text + bound, evidence.part(away), basis="estimate", remedy=remedy, details=rows
    )


def denormals(evidence: Evidence) -> Finding | None:
    """Numbers below 1.2e-38, timed with and without flushing them to zero."""
    weights = denormal_weights(evidence.path)
    values = denormal_activations(evidence.path, evidence.asked, evidence.given)
    if not (weights or values) or not evidence.is_on_cpu:
        return None
    found = trials.flushing(evidence.path, evidence.asked, evidence.given)
    counted = f"{sum(weights.values()):,} weights in {len(weights)} tensors and {sum(values.values()):,} activations"
    if found is None:
        gain, effect = 0.0, "this processor has no flush-to-zero to time them with"
    elif found.verdict == "faster":
        gain = evidence.profile.latency_ms * (1 - 1 / found.value)
        effect = f"flushed to zero an inference is {found.value:.2f}x faster ({found.low:.2f} to {found.high:.2f})"
    else:
        gain, effect = 0.0, "flushing them gains nothing that can be measured on this processor; others slow down"
    rows = tuple({"tensor": name, "denormal": count} for name, count in {**weights, **values}.items())
    remedy = "set tiny weights to zero (`compress export` does), or set session.set_denormal_as_zero to 1"
    text = f"{counted} are denormal: {effect}"
    return evidence.finding("denormals", text, gain, basis="measured", remedy=remedy, details=rows)


def misaligned(evidence: Evidence) -> Finding | None:
    """Convolutions whose channels are no multiple of the vector unit's block, timed alone at the next multiple."""
    if not evidence.is_on_cpu:
        return None
    rows, seen = list[dict[str, Any]](), dict[Layer, dict[str, Any]]()
    for layer in layers(evidence.path, evidence.asked, evidence.given):
        kind = replace(layer, name="")
        if kind not in seen:
            seen[kind] = _alignment(layer, evidence)
        if seen[kind]:
            rows.append({"layer": layer.name, **seen[kind]})
    rows.sort(key=lambda row: -row["gain_ms"])
    gain, block = sum(row["gain_ms"] for row in rows), evidence.block
    if gain < NOTABLE * evidence.profile.latency_ms:
        return None
    wide, padded = ([row for row in rows if row["basis"] == basis] for basis in ("measured", "estimate"))
    parts = [f"{len(rows)} convolutions have channels that are no multiple of {block}"]
    if wide:
        parts.append(
            f"{len(wide)} of them are faster with more channels, by {_total(wide):.3g} ms together (timed alone)"
        )
    if padded:
        saving = f"their cut should have saved {_total(padded):.3g} ms by its share of the MACs, and did not"
        parts.append(f"{len(padded)} cost what the next multiple costs: {saving}")
    return evidence.finding(
        "misaligned widths", "; ".join(parts), gain, basis="estimate" if padded else "measured",
        remedy=f"multiples of {block} (--round-to {block}): the next one up is no slower, the one below saves time",
        details=tuple(rows),
    )  # fmt: skip


def _alignment(layer: Layer, evidence: Evidence) -> dict[str, Any]:
    """What a layer would gain at aligned channels, alone; empty where it is aligned or gains nothing.

    Times alone are as profiled; the gain is scaled by what an inference takes of the profiled operators' sum.
    """
    wide = alone.widened(layer, evidence.block)
    if wide == layer:
        return {}
    now, then = alone.side_by_side(layer, wide, evidence.asked, block=evidence.block)
    found = {"channels": [layer.inputs, layer.outputs], "aligned": [wide.inputs, wide.outputs], "ms": now,
             "aligned_ms": then}  # fmt: skip
    fixed = min(node.ms for node in evidence.profile.nodes)
    idle = (now - fixed) * (1 - layer.macs / wide.macs) if then < (1 + WASTED) * now else 0.0
    gain, basis = (now - then, "measured") if now - then > WASTED * now else (idle, "estimate")
    if gain < max(WASTED * now, RESOLVED):
        return {}
    scale = min(1.0, evidence.profile.latency_ms / _sum(evidence.profile.nodes))
    return {**found, "gain_ms": scale * gain, "basis": basis}


def _total(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(row["gain_ms"] for row in rows))


def norms(evidence: Evidence) -> Finding | None:
    """Batch norms that the runtime could not fold into a convolution."""
    left = [node for node in evidence.profile.nodes if node.op == "BatchNormalization"]
    if not left or evidence.part(left) < NOTABLE * evidence.profile.latency_ms:
        return None
    text = f"{len(left)} batch norms run as operators of their own; folded into a convolution they would take no time"
    remedy = "export in evaluation mode with the norm right behind its convolution (`compress export` does)"
    return evidence.finding("unfused norms", text, evidence.part(left), basis="estimate", remedy=remedy)


def conversions(evidence: Evidence) -> Finding | None:
    """Changes of layout or type beyond the two that any network needs, at its beginning and its end."""
    found = [node for node in evidence.profile.nodes if node.op.startswith(CONVERTING)]
    spare = sorted(found, key=lambda node: -node.ms)[2:]
    if evidence.share(spare) < CONVERTED:
        return None
    kinds = ", ".join(f"{sum(node.op == op for node in found)} {op}" for op in sorted({node.op for node in found}))
    text = f"{kinds}: {100 * evidence.share(found):.0f} % of the operators' time goes into changing layouts or types"
    remedy = (
        f"widths that are multiples of {evidence.block} keep one layout; of an int8 file, unsigned activations on x86"
    )
    rows = tuple({"name": node.name, "op": node.op, "ms": node.ms} for node in found)
    gain = evidence.part(spare)
    return evidence.finding("conversions", text, gain, basis="estimate", remedy=remedy, details=rows)


def memory(evidence: Evidence) -> Finding | None:
    """Operators that move many bytes for few MACs: cutting their MACs does not make them faster."""
    worth = [node for node in evidence.profile.nodes if node.ms > TINY * evidence.floor_ms]
    low = [node for node in worth if intensity(node) < LOW and not node.op.startswith(CONVERTING)]
    speeds = sorted(_macs(node) / node.ms for node in worth if intensity(node) >= LOW)
    if evidence.share(low) < BOUND or not speeds:
        return None
    usual = speeds[len(speeds) // 2]
    over = sum(max(0.0, node.ms - _macs(node) / usual) for node in low) / max(_sum(low), 1e-9)
    text = (
        f"{len(low)} operators move a byte for fewer than {LOW:g} MACs (depthwise convolutions, sums, norms) and take "
        f"{100 * evidence.share(low):.0f} % of the operators' time; at the others' MACs per second they would gain this"
    )
    rows = tuple({"name": n.name, "op": n.op, "ms": n.ms, "macs_per_byte": intensity(n)} for n in low)
    remedy = (
        "their time goes with channels and pixels, not with MACs: cut those (--metric latency), or move fewer bytes "
    )
    remedy += "(`compress quantize`)"
    gain = over * evidence.part(low)
    return evidence.finding("memory-bound", text, gain, basis="estimate", remedy=remedy, details=rows)


def overhead(evidence: Evidence) -> Finding | None:
    """Fixed cost per operator against the time of an inference."""
    count, latency = len(evidence.profile.nodes), evidence.profile.latency_ms
    gain = min(latency, count * evidence.floor_ms)
    if gain < OVERHEAD * latency or not evidence.is_on_cpu:
        return None
    text = (
        f"{count} operators of {1e3 * evidence.floor_ms:.2g} us fixed cost each are {100 * gain / latency:.0f} % of an "
        "inference, which no cut of channels takes away; the gain is what none of them would leave"
    )
    remedy = "fewer layers (--drop-blocks) or more images at a time (--batch), which share the fixed cost"
    return evidence.finding("overhead", text, gain, basis="estimate", remedy=remedy)


def threads(evidence: Evidence) -> Finding | None:
    """Whether one thread is faster than those asked for: small operators wait for each other more than they work."""
    if evidence.asked.threads == 1 or not evidence.is_on_cpu:
        return None
    found = trials.one_thread(evidence.path, evidence.asked, evidence.given)
    if found.verdict != "faster":
        return None
    gain = evidence.profile.latency_ms * (1 - 1 / found.value)
    text = (
        f"one thread is {found.value:.2f}x faster ({found.low:.2f} to {found.high:.2f}) than {evidence.asked.threads}"
    )
    return evidence.finding("threads", text, gain, basis="measured", remedy="run it with one thread (--threads 1)")


def intensity(node: Node) -> float:
    """MACs per byte that goes in or out, in float32."""
    moved = 4 * sum(math.prod(shape) for shape in (*node.inputs, *node.outputs))
    return _macs(node) / max(moved, 1)


def _macs(node: Node) -> int:
    """Of convolutions and matrix products; 0 for everything else."""
    if node.op in ("Conv", "FusedConv") and len(node.inputs) > 1 and node.outputs:
        return math.prod(node.outputs[0]) * math.prod(node.inputs[1][1:])
    if node.op in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul") and node.inputs and node.outputs:
        return math.prod(node.outputs[0]) * node.inputs[0][-1]
    return 0


def _sum(nodes: Sequence[Node]) -> float:
    return sum(node.ms for node in nodes)


# kind -> what looks for it; the order of ties
FINDINGS: dict[str, Callable[[Evidence], Finding | None]] = {
    "fallback": fallback,
    "denormals": denormals,
    "misaligned widths": misaligned,
    "unfused norms": norms,
    "conversions": conversions,
    "memory-bound": memory,
    "overhead": overhead,
    "threads": threads,
}
