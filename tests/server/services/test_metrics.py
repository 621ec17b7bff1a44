"""What a server tells Prometheus, and that docs/operations.md tells of all of it."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from serving_tools import Served
from zoo import Zoo

from adapterbay.client import Client
from adapterbay.client.errors import ServerError
from adapterbay.registry.errors import InvalidArgument

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def measured(zoo: Zoo) -> Iterator[Served]:
    with Served(zoo, metrics_port=0) as served:
        yield served


def scrape(served: Served) -> str:
    url = f"http://127.0.0.1:{served.serving.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text: str = response.read().decode()
    return text


def values(served: Served) -> dict[str, float]:
    """Values by name and labels, `name{label=value,…}`."""
    found = {}
    for family in text_string_to_metric_families(scrape(served)):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("adapterbay_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_the_figures_are_those_of_what_happened(measured: Served) -> None:
    before = values(measured)
    with Client(measured.address) as client:
        for _ in range(3):
            client.generate("Once upon", adapter="tales", max_tokens=5, ignore_end=True)
        client.generate("Once upon", base=True, max_tokens=2, ignore_end=True)
        client.pin_adapter("songs")
        with pytest.raises(ServerError):
            client.generate("Once upon", adapter="nobody")
        with pytest.raises(ServerError):
            client.generate("Once upon", adapter="foreign")
        measured.idle()
        after = values(measured)
        grown = {key: round(value - before.get(key, 0), 9) for key, value in after.items()}
        assert grown["generated_tokens_total"] == 17
        assert grown["prompt_tokens_total"] == 4 * len("Once upon")
        assert grown["rows_ended_total"] == grown["queue_seconds_count"] == grown["first_token_seconds_count"] == 4
        assert grown["adapter_misses_total{tier=host}"] == grown["adapter_misses_total{tier=device}"] == 1
        assert grown["adapter_hits_total{tier=host}"] == grown["adapter_hits_total{tier=device}"] == 2
        assert grown["adapter_load_seconds_count"] == 2
        assert grown["adapters{tier=host}"] == 2
        assert grown["adapters{tier=device}"] == grown["adapters_pinned"] == 1
        assert grown["calls_total{code=OK,method=Generate}"] == 4
        assert grown["calls_total{code=NOT_FOUND,method=Generate}"] == 1
        assert grown["calls_total{code=FAILED_PRECONDITION,method=Generate}"] == 1
        assert grown["steps_total"] >= 15
        assert after["rows{state=running}"] == after["rows{state=waiting}"] == 0
        assert after["cache_blocks{state=used}"] == 0
        stats = measured.engine.stats()
        assert after["adapter_bytes{tier=host}"] == stats.host_bytes > 0
        assert after["adapter_bytes{tier=device}"] == stats.device_bytes > 0
        assert after["adapter_budget_bytes{tier=device}"] == measured.engine.config.device_bytes

        client.pin_adapter("songs", False)
        client.unload_adapter("tales")
        client.unload_adapter("songs")
        client.generate("Once upon", base=True, max_tokens=1)  # the slots are free before the next step
        final = values(measured)
        assert final["adapter_unloads_total"] - after["adapter_unloads_total"] == 2
        assert final["adapters{tier=host}"] == final["adapter_bytes{tier=device}"] == final["adapters_pinned"] == 0


def test_the_docs_tell_of_every_metric_and_of_no_other(measured: Served) -> None:
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(scrape(measured))
        if family.name.startswith("adapterbay_")
    }
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(adapterbay_\w+)", text)) == exported


def test_it_tells_of_the_process_and_is_nobody_elses_registry(measured: Served) -> None:
    assert "process_resident_memory_bytes" in scrape(measured)
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("adapterbay")]


def test_it_is_off_unless_asked_for(served: Served) -> None:
    assert served.serving.metrics_port is None


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(zoo: Zoo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"Metrics port {port}") as caught:
            Served(zoo, metrics_port=port).__enter__()
    assert caught.value.field == "metrics_port"


def test_a_stopped_server_gives_its_port_back(zoo: Zoo) -> None:
    with Served(zoo, metrics_port=0) as served:
        port = served.serving.metrics_port
        assert "adapterbay_steps_total" in scrape(served)
    with pytest.raises(urllib.error.URLError):
        scrape(served)
    assert port is not None
    with socket.create_server(("127.0.0.1", port)):
        pass
