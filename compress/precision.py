"""convert(): an ONNX file in int8 or float16, by the converters that come with ONNX Runtime."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from torch import Tensor

from compress.bench.machine import has_int8_products, vector_unit
from compress.bench.session import one_line, open_session, runtime_errors
from compress.errors import CompressError
from compress.onnx_file import densify
from compress.silence import silence

To = Literal["int8", "fp16"]
Calibration = Literal["minmax", "entropy", "percentile"]
FP16_MOST = 65504.0  # the largest finite float16
METHODS: dict[Calibration, str] = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# What the converters let through: their own errors, and those of shape inference beneath them.
_CONVERTER_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def convert(
    source: Path, target: Path, to: To, *, calibration: Calibration, images: Sequence[Tensor]
) -> dict[str, Any]:
    """Write `target`: int8 or float16 inside, inputs and outputs as they were, metadata carried along; how it was done.

    int8: static, in QDQ form, weights per channel, by onnxruntime.quantization after its pre-processing, ranges from
    `images`, batches (N, C, H, W). Activations are unsigned except on ARM, whose kernels are signed. Where the
    processor has no instruction that adds products of bytes up in 32 bits (VNNI), pairs of products saturate 16 bits:
    there weights take seven bits (onnxruntime's `reduce_range`).
    fp16: by onnxruntime.transformers, which is here already; onnxconverter-common's twin would be one package more.

    Raises:
        CompressError: the converters cannot express the network.
    """
    import onnx

    errors: tuple[type[Exception], ...] = (*_CONVERTER_ERRORS, *runtime_errors())
    errors += (onnx.shape_inference.InferenceError, onnx.checker.ValidationError)
    how: dict[str, Any] = {"weights": "float16"}
    try:
        with silence(), _search_path():
            proto = onnx.load(source)
            kept = {entry.key: entry.value for entry in proto.metadata_props}
            densify(proto.graph)
            if to == "fp16":
                _to_fp16(proto, target)
            else:
                how = _choices(calibration, images)
                _to_int8(proto, target, how, images)
    except errors as error:
        raise CompressError(f"{source} cannot be turned into {to}: {one_line(error)}") from error
    _set_metadata(target, {**kept, "quantized": to, **{key: str(value) for key, value in how.items()}})
    return how


def largest(source: Path, batches: Iterable[Tensor]) -> float:
    """The largest magnitude of any float32 tensor between the operators of a file, on images (N, C, H, W).

    ONNX Runtime on a CPU computes float16 files in float32, so that an overflow would show on a GPU alone.
    """
    import onnx

    proto = onnx.shape_inference.infer_shapes(onnx.load(source))
    floats = {v.name for v in (*proto.graph.value_info, *proto.graph.output)
              if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}  # fmt: skip
    names = sorted({name for node in proto.graph.node for name in node.output} & floats)
    del proto.graph.output[:]
    for name in names:
        for kind, before, after in (("Abs", name, f"{name}/abs"), ("ReduceMax", f"{name}/abs", f"{name}/most")):
            options: dict[str, Any] = {"keepdims": 0} if kind == "ReduceMax" else {}
            proto.graph.node.append(onnx.helper.make_node(kind, [before], [after], **options))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}/most", onnx.TensorProto.FLOAT, []))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "watched.onnx")
        session = open_session(Path(folder) / "watched.onnx", threads=1)
        feeds = ({session.get_inputs()[0].name: batch.contiguous().numpy()} for batch in batches)
        return max(float(value) for feed in feeds for value in session.run(None, feed))


def _choices(calibration: Calibration, images: Sequence[Tensor]) -> dict[str, Any]:
    is_arm = vector_unit() == "neon"
    return {
        "weights": "int8 per channel", "weight_bits": 8 if is_arm or has_int8_products() else 7,
        "activations": "int8" if is_arm else "uint8", "calibration": calibration,
        "calibration_images": sum(len(batch) for batch in images),
    }  # fmt: skip


def _to_fp16(proto: Any, target: Path) -> None:
    import onnx
    from onnxruntime.transformers import float16

    onnx.save(float16.convert_float_to_float16(proto, keep_io_types=True), target)


def _to_int8(proto: Any, target: Path, how: Mapping[str, Any], images: Sequence[Tensor]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static

    is_unsigned = how["activations"] == "uint8"
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared = Path(folder) / "plain.onnx", Path(folder) / "prepared.onnx"
        onnx.save(proto, plain)
        # Its symbolic shape inference is for transformers whose shapes depend on data, and raises bare Exceptions.
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, target, _Reader(proto.graph.input[0].name, images), quant_format=QuantFormat.QDQ,
            per_channel=True, reduce_range=how["weight_bits"] == 7, weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8 if is_unsigned else QuantType.QInt8,
            calibrate_method=CalibrationMethod[METHODS[how["calibration"]]],
            # A stride of one batch: the collector would otherwise hold the activations of all images at once.
            extra_options={"CalibStridedMinMax": 1, "CalibTensorRangeSymmetric": not is_unsigned},
        )  # fmt: skip


def _set_metadata(made: Path, values: Mapping[str, str]) -> None:
    """In place of what the converters left."""
    import onnx

    proto = onnx.load(made)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(values))
    made.write_bytes(proto.SerializeToString())


@contextmanager
def _search_path() -> Iterator[None]:
    """What the converters' import adds to the search path is taken away again."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


class _Reader:
    """onnxruntime's protocol for calibration: batches by position, one stretch after the other."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._name, self._batches = name, batches
        self._next = iter(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._next, None)
        return None if batch is None else {self._name: batch.contiguous().numpy()}
