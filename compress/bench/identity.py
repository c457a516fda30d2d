"""Which file was measured: a name that tells it apart, its digest and its sizes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.bench.protocol import Network, Source


def file_of(source: Source) -> Path:
    """The file that a source is: an ONNX file itself, a network's weights."""
    return source.path if isinstance(source, Network) else source


def names(files: Sequence[Path]) -> list[str]:
    """Each path's last parts, as many as tell the files apart: a report holds no path of the machine."""
    paths = [path.resolve() for path in files]
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        short = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(short)) == len(set(paths)):
            break
    return short


def size(path: Path) -> dict[str, Any]:
    """The sha256, the bytes on disk and the bytes after gzip (level 6, which web servers and wheels use)."""
    digest, packer, packed = hashlib.sha256(), zlib.compressobj(6, wbits=31), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            packed += len(packer.compress(chunk))
    packed += len(packer.flush())
    return {"sha256": digest.hexdigest(), "size_bytes": path.stat().st_size, "size_gzip_bytes": packed}
