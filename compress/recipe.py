"""Recipe: every knob of a run, frozen, checked once, saved beside every output. `pipeline` alone opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from compress.errors import UsageError

Metric = Literal["params", "macs", "size", "latency"]
SECTIONS = {"model", "data", "prune", "train", "bench", "quantize"}


def _on_or_off(value: Any) -> Any:
    """YAML 1.1 reads the words on and off as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


_FROZEN = ConfigDict(frozen=True, extra="forbid")


class ModelPart(BaseModel):
    """The network to prune. `path` and `arch` are what the command line was given, made absolute."""

    model_config = _FROZEN
    path: str = Field(description="checkpoint file")
    arch: str = Field("", description="--arch; empty: from the file's metadata or by matching shapes")
    arch_args: dict[str, Any] = Field(default_factory=dict, description="--arch-arg key=value")


class DataPart(BaseModel):
    """The images. Sizes and normalisation come from the checkpoint's metadata where it has them."""

    model_config = _FROZEN
    source: str = Field("", description="--data; empty: the data set that the checkpoint names")
    image_size: int | None = Field(None, ge=4, description="pixels a side; None: the network's input size")
    mean: tuple[float, ...] | None = Field(None, description="per channel, of images in 0..1; None: as the file says")
    std: tuple[float, ...] | None = Field(None, description="likewise; where the file says nothing both are measured")
    val_share: float = Field(0.1, gt=0, lt=1, description="share of train held out when no val split is given")
    augment: Literal["auto", "none", "crop", "flip-crop"] = Field(
        "auto", description="auto: by data set, no flips of digits; none in fewer than ten epochs"
    )
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images that fails the run above it"
    )


class PrunePart(BaseModel):
    """How much leaves, and which channels."""

    model_config = _FROZEN
    method: str = Field("l2", description="a regulariser with its own score, or a score alone; benchmarks/LOG.md")
    regularize: tuple[str, ...] = Field((), description="further regularisers, added to the method's")
    score: str = Field("", description="importance; empty: the method's own")
    granularity: Literal["filter", "weight"] = Field(
        "filter", description="filter: channels leave; weight: single weights become 0 in place, the file is sparse"
    )
    keep: float = Field(0.5, gt=0, le=1, description="share of the metric that remains")
    metric: Metric = Field("params", description="what `keep` is a share of; latency: measured as `bench` says")
    target_ms: float | None = Field(None, gt=0, description="milliseconds wanted, in place of `keep`; metric latency")
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="channel block; auto: the machine's vector unit"
    )
    allocation: Literal["balanced", "uniform", "relative", "global"] = Field(
        "balanced", description="how layers compete: compress/allocation.py"
    )
    fold: bool = Field(True, description="refit the layers behind a cut by least squares: compress/folding.py")
    redraw: bool = Field(False, description="draw new weights after the cut: the control, trained from scratch")
    floor: float = Field(0.5, ge=0, le=1, description="least width of a layer, as a share of the even width")
    sensitivity: str = Field("", description="file of `compress sensitivity`: no group alone may lose more than")
    max_group_drop: float | None = Field(
        None, gt=0, le=100, description="points of the metric; None: 1, where measured"
    )
    max_group_distortion: float | None = Field(None, gt=0, description="share of the outputs' norm; None: no limit")
    drop_blocks: bool = Field(False, description="residual branches may leave whole; off: benchmarks/LOG.md")
    rounds: Annotated[int, Field(ge=1, le=100)] | Literal["auto"] = Field(
        "auto", description="cuts on a geometric path to keep, with training between; auto: one a halving"
    )
    penalty_share: float = Field(0.1, gt=0, le=1000, description="penalty at the start, as a share of the task loss")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="of the regularisers, by name: {halo: {xi: 1e-6}}; a strength given is kept"
    )
    strength: float | None = Field(None, gt=0, description="factor on the method's own penalty; None: by penalty_share")


class TrainPart(BaseModel):
    """The loop. Defaults are those of the ResNet and CIFAR literature unless a line says otherwise."""

    model_config = _FROZEN
    epochs: int | None = Field(None, ge=1, description="all phases together; None: enough for 1,500 steps, at least 6")
    sparse_share: float = Field(
        0.2, gt=0, lt=1, description="share of the epochs that train towards sparsity (ours: benchmarks/LOG.md)"
    )
    batch_size: int = Field(128, ge=2, description="images a step, of all processes (He et al., arXiv 1512.03385)")
    lr: float = Field(
        0.05, gt=0, description="peak, for batch 128; half of the from-scratch 0.1: weights are pretrained"
    )
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of a phase's steps with rising rate")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="off: distillation softens the labels already")
    clip_norm: float = Field(5.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = Field(
        "auto", description="torch.compile; auto: when the phase is long enough"
    )
    distill: float = Field(0.9, ge=0, le=1, description="weight of the dense model's soft labels after a cut; 0: off")
    temperature: float = Field(4.0, gt=0, description="of the soft labels (Hinton et al., arXiv 1503.02531)")
    trackers: tuple[str, ...] = Field((), description="experiment trackers that accelerate knows, e.g. tensorboard")


class BenchPart(BaseModel):
    """What the final latencies are measured with."""

    model_config = _FROZEN
    batch: int = Field(1, ge=1, description="of the latencies that the report leads with")
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8, 32), description="measured too, a few seconds each")
    threads: int = Field(1, ge=1)
    seconds: float = Field(
        20.0, gt=0, description="at most, for that batch; a quiet machine needs 2 for small networks"
    )
    runtime: Literal["ort-cpu", "ort-cuda", "ort-tensorrt", "openvino"] = Field("ort-cpu")


class QuantizePart(BaseModel):
    """A second file of lower precision, made from the pruned one and measured beside it: compress/quantize.py."""

    model_config = _FROZEN
    to: Literal["none", "int8", "fp16"] = Field("none", description="none: there is no second file")
    calibration: Literal["minmax", "entropy", "percentile"] = Field("minmax", description="how int8 finds its ranges")
    images: int = Field(256, ge=1, description="of the train split, for the ranges")


class Recipe(BaseModel):
    """All of it. `seed` fixes splits, order, augmentation and initialisation; `threads` are those of training."""

    model_config = _FROZEN
    model: ModelPart
    data: DataPart = DataPart()
    prune: PrunePart = PrunePart()
    train: TrainPart = TrainPart()
    bench: BenchPart = BenchPart()
    quantize: QuantizePart = QuantizePart()
    task: str = Field("", description="--task; empty: as the checkpoint says, else classification")
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto: cuda where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads of training; None: torch's default")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def make(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Check nested values, with `section.key=value` overrides on top, and freeze them.

    Raises:
        UsageError: an unknown key or a value out of range; names the key, the value and what is allowed.
    """
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for text in overrides:
        override(merged, text, like="section.key=value, e.g. train.lr=0.01")
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise UsageError(_first_error(error)) from error


def override(values: dict[str, Any], text: str, *, like: str) -> None:
    """Set what one `--set section.key=value` says, in place; the value is YAML. `like` is an example for errors.

    Raises:
        UsageError: another form, a section that holds no keys, or no YAML.
    """
    path, equals, value = text.partition("=")
    section, _, key = path.rpartition(".")
    if not equals or section.count("."):
        raise UsageError(f"--set {text!r} is not of the form {like}")
    place = values.setdefault(section, {}) if section else values
    if not isinstance(place, dict):
        raise UsageError(f"--set {text!r} sets a key of {section}, which is {place!r}; {section} must be a section")
    try:
        place[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: {value!r} is no YAML value; write for example {path}=0.01") from error


def read(path: Path) -> dict[str, Any]:
    """The values of a recipe file (YAML), not checked yet.

    Raises:
        UsageError: no such file, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the recipe {path} holds no mapping of sections (model, data, prune, train, bench, quantize)")
    for key in ("model", "data", "prune", "train", "bench", "quantize"):
        if key in values and not isinstance(values[key] or {}, dict):
            raise UsageError(f"the recipe {path} has {key}: {values[key]!r}; allowed are indented lines of key: value")
        values[key] = values.get(key) or {}
    return values


def _first_error(error: ValidationError) -> str:
    errors = error.errors()
    first, place = errors[0], errors[0]["loc"][:2]  # what follows names the kinds that one knob may have
    name = ".".join(str(part) for part in (first["loc"] if first["type"] == "extra_forbidden" else place))
    if first["type"] == "extra_forbidden":
        parts = {name: field.annotation for name, field in Recipe.model_fields.items() if name in SECTIONS}
        section = parts.get(str(place[0])) if len(place) > 1 else Recipe
        assert isinstance(section, type) and issubclass(section, BaseModel), place
        return f"the recipe has no key {name!r}; there are {', '.join(section.model_fields)}"
    texts = [found["msg"][0].lower() + found["msg"][1:] for found in errors if found["loc"][:2] == place]
    rest = len(errors) - len(texts)
    return f"{name} = {first['input']!r}: {', or '.join(texts)}" + (f" (and {rest} more)" if rest else "")
