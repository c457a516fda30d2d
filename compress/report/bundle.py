"""plotly.js as a page carries it: packed, with the hash by which the page's policy knows it."""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from functools import cache

from plotly.offline import get_plotlyjs


@dataclass(frozen=True)
class Bundle:
    """`packed` is gzip in base64, 2 MB where the script has 5; `digest` is of the script, as a policy names it."""

    packed: str
    digest: str


@cache
def bundle() -> Bundle:
    """The plotly.js of the installed plotly package; the same bytes for the same package."""
    code = get_plotlyjs().encode()
    return Bundle(base64.b64encode(gzip.compress(code, 9, mtime=0)).decode(), digest(code))


def digest(code: bytes) -> str:
    """A script's hash in the form of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}"
