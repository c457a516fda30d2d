"""From a torch network to an ONNX file that has been proved equal to it, or no file at all."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.bench.session import one_line, open_session, runtime_errors
from compress.errors import CompressError, ParityError
from compress.example import Example, arguments, shapes, tile
from compress.files import atomic_path
from compress.onnx_file import TINY, finish
from compress.silence import silence
from compress.task import Task

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the output's scale: sums in another order differ by 1e-7 to 1e-5, a wrong layer by 1e-2
LEAST_SCALE = 1e-6  # an output of smaller rms would be equal to anything: freshly initialised heads give 0 or 1e-10
BATCHES = (1, 2, 17)  # the usual one, the exported one, and one that no tracer has guessed
LARGEST = 2**31 - 1  # bytes a protobuf message may have; larger networks would need a second file

Exporter = Literal["dynamo", "legacy", "unknown"]
Array = NDArray[Any]
# What the exporters let through: their own errors (a RuntimeError) and those of tracing and conversion beneath them.
_EXPORTER_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


class Proof(BaseModel, frozen=True, extra="forbid"):
    """How equal a file is to its network, taken where the difference relative to the output's scale is largest.

    `top1` and `top1_torch` (percent, on a whole split) are left to whoever has the split: proof.model_copy(update=...).
    """

    max_abs_diff: float
    output_scale: float  # rms of torch's output
    relative: float  # max_abs_diff / output_scale
    tolerance: float
    batches: tuple[int, ...]
    top1_agreement: float | None  # percent of the proof's images with the same largest output; None without classes
    top1: float | None = None  # by ONNX Runtime
    top1_torch: float | None = None
    exporter: Exporter
    flushed: int  # weights set to zero because they were in or near the denormal range
    opset: int


def to_onnx(
    model: nn.Module, example: Example, path: Path | str, *,
    metadata: Mapping[str, str] | None = None, tolerance: float = TOLERANCE, opset: int | None = None,
    sparse: bool = False,
) -> Proof:  # fmt: skip
    """Flush tiny weights, export with a dynamic batch, prove the file equal to the network, only then name it `path`.

    The network is left as it was but for the flushed weights. `example` (N, C, H, W) holds real, normalised inputs, or
    is a tuple of several. The input is called "images", or "in_0", "in_1", ...; the output "logits", or "out_0", ...
    where there are several (tuples and dicts in the order of torch's pytree). `opset` is the exporter's own by default,
    which needs no version conversion. `sparse` stores weights with many zeros by their non-zeros alone: a smaller file,
    loaded into the same network. Whatever was at `path` before is gone, also after a failure.

    Raises:
        ParityError: the file differs from the network, at some batch size, by more than `tolerance` times the output's
            rms, or the output is almost zero or not finite, so that nothing would be proved.
        CompressError: the network is too large for one file, or no exporter can express it.
    """
    images = _tiled(example, 2)
    path = Path(path)
    path.unlink(missing_ok=True)
    flushed = flush_tiny(model)
    network = _plain(model)
    size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    if size > LARGEST:
        raise CompressError(f"the network holds {size} bytes; one ONNX file can hold {LARGEST}; prune it further first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        exporter = _export(network, images, temporary, opset)
        finish(temporary, exporter=exporter, flushed=flushed, given=metadata or {}, sparse=sparse)
        return _prove(network, temporary, example, tolerance, path.name)


def draft(model: nn.Module, example: Example, path: Path) -> None:
    """Export as `to_onnx` does but prove nothing: for how long a network takes, not for what it says.

    Raises:
        CompressError: no exporter can express the network.
    """
    with atomic_path(path) as temporary:
        _export(_plain(model), _tiled(example, 2), temporary, None)


def prove(model: nn.Module, path: Path, inputs: Example, *, tolerance: float = TOLERANCE) -> Proof:
    """Compare an ONNX file with the network at batch 1, 2 and 17, in float32 on the CPU; a Proof, or an error.

    `inputs` (N, C, H, W), or a tuple of several, are real and normalised; they are repeated where there are fewer than
    a batch needs.

    Raises:
        ParityError: the outputs differ in number, shape or value, are not finite, or are almost zero.
        LoadError: the file cannot be loaded.
    """
    return _prove(_plain(model), path, inputs, tolerance, path.name)


def flush_tiny(model: nn.Module) -> int:
    """Set parameters below TINY to exact zero, in place; their number.

    Products with numbers in the denormal range (below 1.2e-38) take a processor up to a hundred times longer; a sparse
    fine-tune leaves many. Zeros cost nothing extra. Buffers stay: a tiny variance is a divisor.
    """
    flushed = 0
    for parameter in (parameter for parameter in model.parameters() if parameter.is_floating_point()):
        tiny = (parameter.detach().abs() < TINY) & (parameter.detach() != 0)
        if count := int(tiny.sum()):
            parameter.detach().masked_fill_(tiny, 0.0)
            flushed += count
    return flushed


def predict(path: Path, batches: Iterable[Tensor | Array], *, threads: int | None = None) -> Iterator[Array]:
    """The file's first output for each batch (N, C, H, W), by ONNX Runtime; torch's number of threads by default.

    Raises:
        LoadError: the file cannot be loaded; raised here, not at the first batch.
        ParityError: the file does not run on a batch.
    """
    session = open_session(path, threads=threads or torch.get_num_threads())
    return (_run(session, (torch.as_tensor(batch),), path.name)[0] for batch in batches)


def metric(path: Path, loader: Iterable[Any], task: Task, *, threads: int | None = None) -> float:
    """The task's metric in percent, 0-100, of what ONNX Runtime gives for the loader's batches: its first output.

    Raises:
        CompressError: there is no batch.
    """
    session, counts = open_session(path, threads=threads or torch.get_num_threads()), list[Tensor]()
    for batch in loader:
        inputs, targets = task.unpack(batch)
        output = torch.from_numpy(_run(session, arguments(inputs), path.name)[0])
        counts.append(task.count(task.logits(output).float(), targets).cpu())
    if not counts:
        raise CompressError(f"no images to measure the metric of {path.name} on; give a split that is not empty")
    return task.value(torch.stack(counts).sum(0))


def read_metadata(path: Path) -> dict[str, str]:
    """What to_onnx wrote into the file (metadata_props): tool, tool_version, exporter, flushed and the caller's own."""
    return dict(open_session(path, threads=1).get_modelmeta().custom_metadata_map)


def _prove(network: nn.Module, file: Path, inputs: Example, tolerance: float, name: str) -> Proof:
    import onnx

    session = open_session(file, threads=torch.get_num_threads())
    worst = (-1.0, 0.0, 0.0)  # relative, max_abs_diff, output_scale
    agreed: list[Array] = []
    for batch in BATCHES:
        images = _tiled(inputs, batch)
        expected, actual = _outputs(network, images), _run(session, images, name)
        if len(actual) != len(expected):
            raise ParityError(f"{name} has {len(actual)} outputs, the network {len(expected)}: not the same network")
        for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
            worst = max(worst, _difference(wanted, got, f"output {index} of {name} at batch {batch}"))
        if expected[0].ndim > 1 and expected[0].shape[1] > 1:
            agreed.append((expected[0].argmax(1) == actual[0].argmax(1)).ravel())
    first = np.atleast_1d(expected[0]).astype(np.float64)
    if len(arguments(inputs)[0]) > 1 and np.ptp(first, axis=0).max() < LEAST_SCALE * worst[2]:
        logger.warning("the network gives the same output for different images: equality with %s proves little", name)
    relative, difference, scale = worst
    if relative > tolerance:
        text = f"differs from the network by {difference:.3g} where its output has rms {scale:.3g}, a share of"
        raise ParityError(f"{name} {text} {relative:.3g}; allowed is {tolerance:.3g}")
    own = session.get_modelmeta().custom_metadata_map
    opsets = {entry.domain: entry.version for entry in onnx.load(file, load_external_data=False).opset_import}
    exporters: dict[str, Exporter] = {"dynamo": "dynamo", "legacy": "legacy"}
    return Proof(
        max_abs_diff=difference, output_scale=scale, relative=relative, tolerance=tolerance, batches=BATCHES,
        top1_agreement=100.0 * float(np.concatenate(agreed).mean()) if agreed else None,
        exporter=exporters.get(own.get("exporter", ""), "unknown"), flushed=int(own.get("flushed", "0")),
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
    )  # fmt: skip


def _difference(wanted: Array, got: Array, where: str) -> tuple[float, float, float]:
    """(relative, max_abs_diff, rms of wanted), or ParityError where they cannot be compared."""
    if wanted.shape != got.shape:
        raise ParityError(f"{where} has shape {got.shape}, the network's {wanted.shape}: is a batch size fixed in it?")
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    for values, whose in ((wanted, "of the network"), (got, "by ONNX Runtime")):
        if not np.isfinite(values).all():
            raise ParityError(f"{where} holds NaN or Inf {whose}; check the weights and the inputs")
    scale = math.sqrt(float(np.square(wanted).mean())) if wanted.size else 0.0
    if scale < LEAST_SCALE:
        raise ParityError(f"{where} is almost zero (rms {scale:.3g}, wanted at least {LEAST_SCALE:g}): equality would "
                          "prove nothing; train the network first, or give real inputs")  # fmt: skip
    difference = float(np.abs(wanted - got).max())
    return difference / scale, difference, scale


def _outputs(network: nn.Module, images: Sequence[Tensor]) -> list[Array]:
    try:
        with torch.no_grad():
            leaves = pytree.tree_leaves(network(*images))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ParityError(f"the network does not run at shape {shapes(images)}: {one_line(error)}") from error
    if not (arrays := [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)]):
        raise CompressError("the network gives no tensor; ONNX needs at least one output")
    return arrays


def _run(session: Any, images: Sequence[Tensor], name: str) -> list[Array]:
    inputs = session.get_inputs()
    if len(inputs) != len(images):
        wanted = "one input" if len(images) == 1 else f"{len(images)} inputs"
        raise ParityError(f"{name} takes {len(inputs)} inputs; a network of {wanted} is wanted")
    try:
        given = [image.float() if i.type == "tensor(float)" else image for i, image in zip(inputs, images, strict=True)]
        return list(session.run(None, {i.name: g.numpy(force=True) for i, g in zip(inputs, given, strict=True)}))
    except runtime_errors() as error:
        raise ParityError(f"{name} does not run at shape {shapes(images)}: {one_line(error)}") from error


def _plain(model: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode and contiguous memory on the CPU, free of torch.compile and accelerate."""
    network: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model))
    if vars(network).pop("_original_forward", None) is not None:  # accelerate's mixed precision, bound to the original
        vars(network).pop("forward", None)
    network.to("cpu", torch.float32).eval().requires_grad_(False)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()  # out of channels-last
    return network


def _tiled(example: Example, batch: int) -> tuple[Tensor, ...]:
    given = arguments(example)
    if given[0].ndim < 2 or any(not image.ndim or len(image) != len(given[0]) or not len(image) for image in given):
        raise CompressError(f"example inputs of shape {shapes(given)} hold no batch; give (N, C, H, W)")
    return tile(given, batch)


def _export(network: nn.Module, images: Sequence[Tensor], target: Path, opset: int | None) -> Exporter:
    """Write the file by the dynamo exporter, or by the legacy one where that fails; which one it was."""
    count = len(_outputs(network, images))
    outputs = ["logits"] if count == 1 else [f"out_{index}" for index in range(count)]
    inputs = ["images"] if len(images) == 1 else [f"in_{index}" for index in range(len(images))]
    asked: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "opset_version": opset}
    asked |= {"f": str(target), "verbose": False, "external_data": False}
    try:
        with silence():
            batch = ({0: torch.export.Dim("batch")},) * len(images)
            torch.onnx.export(network, tuple(images), dynamo=True, dynamic_shapes=batch, **asked)
        return "dynamo"
    except _EXPORTER_ERRORS as error:
        logger.warning("the dynamo exporter failed, trying the legacy one: %s", one_line(error.__cause__ or error))
    try:
        with silence():
            axes = {name: {0: "batch"} for name in (*inputs, *outputs)}
            torch.onnx.export(network, tuple(images), dynamo=False, dynamic_axes=axes, **asked)
    except _EXPORTER_ERRORS as error:
        raise CompressError(f"neither ONNX exporter can express the network: {one_line(error)}") from error
    return "legacy"
