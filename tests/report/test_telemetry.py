"""What OpenTelemetry is told of saves and restores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, KeepLast, OpenTelemetryEvents, OptionsError


def test_where_it_is_not_installed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(OptionsError, match=r"pip install 'cloudckpt\[otel\]'"):
        OpenTelemetryEvents()


def numbers_of(reader: Any) -> dict[str, Any]:
    """Name of a metric → its points."""
    return {
        metric.name: list(metric.data.data_points)
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_saves_and_restores_are_spans_and_numbers(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import StatusCode

    exporter, reader, tracers = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    meters = MeterProvider([reader], shutdown_on_exit=False)
    events = OpenTelemetryEvents(tracer_provider=tracers, meter_provider=meters)
    with CheckpointManager(tmp_path, on_event=events, retention=KeepLast(1), progress="off") as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(10)})
        manager.async_save(3, {"w": torch.ones(10)}).result()
        manager.restore({"w": torch.zeros(10)})
        with pytest.raises(Exception, match="function"):
            manager.save(4, {"w": torch.ones})
    spans = exporter.get_finished_spans()
    assert [(span.name, span.attributes["checkpoint.step"], span.status.status_code) for span in spans] == [
        ("cloudckpt.save", 1, StatusCode.UNSET),
        ("cloudckpt.save", 2, StatusCode.UNSET),
        ("cloudckpt.save", 3, StatusCode.UNSET),
        ("cloudckpt.restore", 3, StatusCode.UNSET),
        ("cloudckpt.save", 4, StatusCode.ERROR),
    ]
    assert all(span.start_time < span.end_time for span in spans)
    assert spans[0].attributes["checkpoint.upload_s"] <= (spans[0].end_time - spans[0].start_time) / 1e9
    assert spans[-1].attributes["error.type"] == "UnsupportedValueError"
    numbers = numbers_of(reader)
    outcomes = {point.attributes["outcome"]: point.value for point in numbers["cloudckpt.saves"]}
    assert outcomes == {"committed": 3, "failed": 1}
    assert numbers["cloudckpt.save.duration"][0].count == 3
    assert numbers["cloudckpt.save.blocked"][0].count == 3
    assert numbers["cloudckpt.restore.duration"][0].count == 1
    assert numbers["cloudckpt.pruned"][0].value == 2
