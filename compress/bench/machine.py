"""The machine that numbers come from: processor, vector unit, memory, versions; never a path, a user or a host name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino", "numpy",
            "torch-pruning", "accelerate")  # fmt: skip
BLOCKS = {"avx512": 16, "avx2": 8, "neon": 8, "unknown": 8}  # channels per block of the runtime's convolutions


def vector_unit() -> str:
    """The widest vector unit known here: a key of BLOCKS. Read from /proc/cpuinfo; "unknown" where there is none."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon"
    flags = _cpuinfo("flags").split()
    if "avx512f" in flags:
        return "avx512"
    return "avx2" if "avx2" in flags else "unknown"


def vector_block() -> int:
    """Channels that one block of the machine's vector unit holds in float32: 16 with AVX-512, else 8.

    8 is also the answer where the unit is not known (no /proc/cpuinfo): a multiple of 8 costs at most 7 channels a
    layer, and an unaligned width can cost more time than the removed channels save.
    """
    return BLOCKS[vector_unit()]


def has_int8_products() -> bool:
    """Whether the processor adds products of bytes up in 32 bits (VNNI on x86); False where that is not known."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(_cpuinfo("flags").split())


def describe() -> dict[str, Any]:
    """Processor, cores, memory, operating system, versions and GPUs, as JSON values."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(allowed_cpus()),
        "vector_unit": vector_unit(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "gpus": _gpus(),
    }


def package_version(name: str) -> str | None:
    """The installed version, without importing the package; None when it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def allowed_cpus() -> tuple[int, ...]:
    """The processors that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...] | None]:
    """Keep this thread, and the threads and processes it starts, on the `threads` idlest processors; undone at the end.

    Yields the processors, or None where the operating system does not pin (macOS).
    """
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    chosen = _idlest(threads)
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def _idlest(threads: int) -> tuple[int, ...]:
    import psutil

    cpus = allowed_cpus()
    if threads >= len(cpus):
        return cpus
    load = psutil.cpu_percent(interval=0.1, percpu=True)
    by_load = sorted(cpus, key=lambda cpu: load[cpu] if cpu < len(load) else 0.0)
    return tuple(sorted(by_load[:threads]))


def _cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _gpus() -> list[str]:
    """GPU names by nvidia-smi, which needs no CUDA library in this process; none when it is absent or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]
