"""Set before torch is loaded: tests start servers and trainers beside themselves."""

from __future__ import annotations

import pytest

from adapterbay.registry.threads import be_a_good_neighbour

be_a_good_neighbour()
pytest.register_assert_rewrite("registry.conformance")
