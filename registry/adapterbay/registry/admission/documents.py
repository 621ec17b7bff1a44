"""Documents that come with an adapter: JSON and text of strangers, read within limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import Rejected

STATE_FILE: Final = "trainer_state.json"
"""What transformers' Trainer leaves in a checkpoint."""

MAX_BYTES: Final = 8 * 2**20
MAX_VALUES: Final = 500_000
"""A list item costs Python some 60 bytes where JSON needs two."""


def read_bytes(source: Path | bytes, what: str, max_bytes: int = MAX_BYTES, *, follow: bool = True) -> bytes:
    """A whole file; without `follow` the path itself may be no link.

    Raises Rejected with reason TOO_LARGE, or what `open_regular` raises.
    """
    if isinstance(source, bytes):
        data = source[: max_bytes + 1]
    else:
        with open_regular(source, what, follow=follow) as file:
            # As much as is asked for is allocated at once.
            data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    if len(data) > max_bytes:
        raise Rejected(f"{what} has more than {max_bytes} bytes.", reason="TOO_LARGE", metadata={"file": what})
    return data


def read_document(
    source: Path | bytes, what: str, max_bytes: int = MAX_BYTES, *, follow: bool = True
) -> dict[str, Any]:
    """A JSON object. Raises Rejected: TOO_LARGE or BAD_JSON, or what `open_regular` raises."""
    return parse_json_object(read_bytes(source, what, max_bytes, follow=follow), what, max_values=MAX_VALUES)
