"""What one request holds of the adapters in host memory. Knows nothing of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from adapterbay.server.adapters.residency import Resident

_next: Final[Callable[[], int]] = itertools.count(1).__next__


@dataclass(slots=True, eq=False)
class Claim:
    """The rows of one request, which begin together: they need all of their adapters at once."""

    serial: int = field(default_factory=lambda: _next())  # in order of arrival
    residents: list[Resident] = field(default_factory=list)  # [memory] one entry for each hold

    @property
    def complete(self) -> bool:
        """Whether everything it holds is loaded: then it runs, ends, and lets go."""
        return all(resident.form is not None for resident in self.residents)
