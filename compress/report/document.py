"""Report: the one JSON document of a run, as types; schema.json beside this file is generated from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.bench.results import Comparison, Measurement, Speedup
from compress.curves import Sensitivity

_FROZEN = ConfigDict(frozen=True, extra="forbid")
Figure = float | None  # None: not measured, or not finite


class LatencyMs(BaseModel):
    """Milliseconds per batch; `n` single inferences were timed."""

    model_config = _FROZEN
    p50: float
    p90: float
    p99: float
    batch: int
    threads: int
    runtime: str
    n: int


class Metric(BaseModel):
    """What the task measures, in percent on `split`: top1, miou, or what a task of one's own calls its metric."""

    model_config = _FROZEN
    name: str
    value: Figure


class Network(BaseModel):
    """What one network costs and does. `params` numbers, `macs` per image, `top1` percent on `split`."""

    model_config = _FROZEN
    params: int
    macs: int
    size_bytes: int
    top1: float | None = Field(description="None where the task measures something else")
    metric: Metric
    latency_ms: LatencyMs
    throughput: float = Field(description="images/s at the median")


class Kept(BaseModel):
    """What remains, as a share of the dense network, 0 to 1."""

    model_config = _FROZEN
    params: float
    macs: float
    size: float


class Gain(BaseModel):
    """How many times faster the pruned file is, with its confidence interval."""

    model_config = _FROZEN
    value: float
    low: float
    high: float
    confidence: float
    verdict: Literal["faster", "slower", "not distinguishable"]


class Proof(BaseModel):
    """How equal an ONNX file is to its network, where the difference relative to the output's scale is largest."""

    model_config = _FROZEN
    max_abs_diff: float
    output_scale: float = Field(description="rms of torch's output")
    tolerance: float = Field(description="largest allowed max_abs_diff / output_scale")
    batches: tuple[int, ...]
    top1_agreement: float | None = Field(description="percent of the proof's images with the same largest output")
    exporter: str
    flushed: int = Field(description="tiny weights set to zero")
    opset: int | None = None


class Parity(Proof):
    """The proof of the pruned file, and beside it that of the dense one."""

    dense: Proof


class SplitUsed(BaseModel):
    """The images that the metric was taken on."""

    model_config = _FROZEN
    name: str
    images: int


class Channels(BaseModel):
    """Channels of one group, before and after."""

    model_config = _FROZEN
    dense: int
    pruned: int


class Density(BaseModel):
    """Weights of one layer, and how many of them are not 0."""

    model_config = _FROZEN
    weights: int
    nonzero: int


class Densities(BaseModel):
    """Share of the weights that are alive, per weight tensor, at one step of a method that moves them about."""

    model_config = _FROZEN
    round: int = 1
    step: int = Field(description="counted from the start of the round")
    layers: dict[str, float]


class Lambdas(BaseModel):
    """The strength of a penalty that moves while it trains, per group (a mean where a group has many), at one step."""

    model_config = _FROZEN
    round: int = 1
    step: int = Field(description="counted from the start of the round")
    groups: dict[str, Figure]


class Round(BaseModel):
    """The task's metric on the validation split, in percent: after a round's training, and right after its cut."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    trained: Figure = None
    cut: Figure = None


class ValTop1(BaseModel):
    """The task's metric (top-1) on the validation split along the way, in percent."""

    model_config = _FROZEN
    dense: float
    rounds: tuple[Round, ...]
    recovered: dict[str, Any]


class Epoch(BaseModel):
    """One epoch; what a loop adds to its lines is kept."""

    model_config = ConfigDict(frozen=True, extra="allow")
    phase: str
    epoch: int
    loss: Figure = None
    penalty: Figure = None
    val_top1: Figure = None
    val_loss: Figure = None
    seconds: Figure = None


class Strength(BaseModel):
    """What the first round's training began with."""

    model_config = _FROZEN
    name: str = Field(description="of the regulariser")
    share: float | None = Field(description="of the task loss, that the penalty was scaled to; None: as given")
    values: dict[str, float]


class Quantized(BaseModel):
    """The pruned file at lower precision; all of quantize.json's entry is not repeated here."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    verdict: str
    file: str
    sha256: str
    to: str
    how: dict[str, Any] = Field(description="types of weights and activations, calibration")
    size_bytes: int
    metric: Metric
    latency_ms: LatencyMs
    before_ms: LatencyMs = Field(description="of the float32 file, in the same run")
    speedup: Gain
    top1_agreement: float | None = Field(description="percent of validation images with the same largest output")
    snr_db: float | None = Field(description="outputs' power over that of the difference; None: no difference")


class Input(BaseModel):
    """What the ONNX file takes: float32 (batch, *size), pixels in 0..1 less `mean`, over `std`."""

    model_config = _FROZEN
    name: str
    size: tuple[int, int, int] | None = Field(description="C, H, W")
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


class Report(BaseModel):
    """Everything a run measured, with its conditions. MACs per image, top-1 in percent, latency in milliseconds."""

    model_config = _FROZEN
    verdict: str = Field(description="the result in one line")
    out: str
    onnx: str
    checkpoint: str
    report: str
    arch: str
    method: str
    target: float = Field(description="share of `metric` that was to remain, 0 to 1")
    metric: str
    seed: int
    dense: Network
    pruned: Network
    kept: Kept
    speedup: Gain
    parity: Parity
    quantized: Quantized | None = Field(None, description="None: there is none")
    unquantized: str = Field("", description="why there is none, where it was asked for")
    split: SplitUsed
    frozen: dict[str, str] = Field(description="group -> why it could not be cut")
    widths: dict[str, Channels]
    granularity: Literal["filter", "weight"] = Field(
        "filter", description="weight: single weights are 0 in place, `params` leaves them out, the file is sparse"
    )
    density: dict[str, Density] = Field(default_factory=dict, description="per layer, at granularity weight")
    density_log: tuple[Densities, ...] = Field((), description="of sparse training, in the order of its steps")
    lambda_log: tuple[Lambdas, ...] = Field((), description="of a method whose lambda moves, in the order of its steps")
    dropped: tuple[str, ...] = Field((), description="modules that left as a whole, with their residual branch")
    unaligned: dict[str, int] = Field(description="group -> width that is no multiple of `block`")
    block: int = Field(description="channels that widths were rounded to")
    uncounted: tuple[str, ...] = Field(description="operators that are not in the MACs")
    val_top1: ValTop1
    history: tuple[Epoch, ...]
    regularizers: tuple[dict[str, Any], ...] = Field(description="numbers of each at the end of the last round")
    strengths: tuple[Strength, ...] = Field((), description="of each penalty at the start of the first round")
    measurements: tuple[Measurement, ...] = Field(description="dense first, in the order of the files measured")
    speedups: tuple[Speedup, ...]
    further: tuple[Comparison, ...] = Field((), description="the same files at other batches and by other runtimes")
    sensitivity: Sensitivity | None = Field(None, description="what each group costs when cut alone, where measured")
    conditions: dict[str, Any] = Field(description="of the measurement")
    environment: dict[str, Any] = Field(description="of the training and the proof")
    data: dict[str, Any]
    input: Input
    labels: tuple[str, ...]
    recipe: dict[str, Any]
    seconds: dict[str, float] = Field(description="per stage")
