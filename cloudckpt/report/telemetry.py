"""Turn events into spans and metrics of OpenTelemetry, which is imported when somebody asks for them.

A span is made when its save or restore has ended, with the times that it had: nothing waits for the end of one, and
nothing is lost but the span of a job that dies. Called on the thread of `Teller`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from cloudckpt.errors import OptionsError
from cloudckpt.report.events import Event, Preempted, Pruned, Restored, SaveCommitted, SaveFailed, SaveStaged

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["OpenTelemetryEvents"]

_NAME = "cloudckpt"
_Attributes = dict[str, str | bool | int | float]


class OpenTelemetryEvents:
    """Events as spans and metrics: `on_event=OpenTelemetryEvents()`. Needs `pip install 'cloudckpt[otel]'`.

    Spans `cloudckpt.save` and `cloudckpt.restore`, with `checkpoint.step`, `.epoch`, `.url`, `.bytes`, `.world_size`,
    the seconds of each phase (`.plan_s`, …), requests and retries; that of a failed save has the status of an error.
    Histograms `cloudckpt.save.duration`, `cloudckpt.save.blocked` and `cloudckpt.restore.duration`, in seconds;
    counters `cloudckpt.saves` (by `outcome`), `cloudckpt.save.bytes`, `cloudckpt.requests`, `cloudckpt.retries`,
    `cloudckpt.pruned` and `cloudckpt.preemptions`.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        """Report to these providers, or the global ones.

        Raises:
            OptionsError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import metrics, trace
        except ImportError as exc:
            raise OptionsError("OpenTelemetry is not installed; pip install 'cloudckpt[otel]'") from exc
        self._trace = trace
        self._tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
        self._save_s = meter.create_histogram("cloudckpt.save.duration", "s", "From the begin of a save to its commit")
        self._blocked_s = meter.create_histogram("cloudckpt.save.blocked", "s", "For which a save kept training")
        self._restore_s = meter.create_histogram("cloudckpt.restore.duration", "s", "Of a restore")
        self._saves = meter.create_counter("cloudckpt.saves", "{save}", "Saves that have ended, by outcome")
        self._bytes = meter.create_counter("cloudckpt.save.bytes", "By", "Bytes of committed checkpoints")
        self._requests = meter.create_counter("cloudckpt.requests", "{request}", "Of rank 0, in saves and restores")
        self._retries = meter.create_counter("cloudckpt.retries", "{request}", "Those of them that were retries")
        self._pruned = meter.create_counter("cloudckpt.pruned", "{checkpoint}", "Checkpoints that exist no more")
        self._notices = meter.create_counter("cloudckpt.preemptions", "{notice}", "Notices that the machine goes")

    def __call__(self, event: Event) -> None:
        """Report an event."""
        match event:
            case SaveStaged():
                self._blocked_s.record(event.blocked_s)
            case SaveCommitted():
                self._committed(event)
            case SaveFailed():
                self._failed(event)
            case Restored():
                self._restore_s.record(event.seconds)
                self._count(event)
                about: _Attributes = {"checkpoint.epoch": event.epoch, "checkpoint.bytes": event.total_bytes}
                self._span("cloudckpt.restore", event, about)
            case Pruned():
                self._pruned.add(1, {"why": event.why})
            case Preempted():
                self._notices.add(1)

    def _committed(self, event: SaveCommitted) -> None:
        self._save_s.record(event.seconds)
        if not event.in_background:
            self._blocked_s.record(event.seconds)
        self._saves.add(1, {"outcome": "committed"})
        self._bytes.add(event.total_bytes)
        self._count(event)
        about: _Attributes = {
            "checkpoint.epoch": event.epoch,
            "checkpoint.bytes": event.total_bytes,
            "checkpoint.in_background": event.in_background,
            **{f"checkpoint.{name}_s": seconds for name, seconds in event.phases.items()},
        }
        if event.slowest_rank is not None:
            about["checkpoint.slowest_rank"] = event.slowest_rank
        self._span("cloudckpt.save", event, about)

    def _failed(self, event: SaveFailed) -> None:
        self._saves.add(1, {"outcome": "failed"})
        self._count(event)
        about: _Attributes = {"error.type": event.kind, "checkpoint.in_background": event.in_background}
        self._span("cloudckpt.save", event, about, error=event.error)

    def _count(self, event: SaveCommitted | SaveFailed | Restored) -> None:
        self._requests.add(event.requests)
        self._retries.add(event.retries)

    def _span(
        self, name: str, event: SaveCommitted | SaveFailed | Restored, about: _Attributes, *, error: str | None = None
    ) -> None:
        attributes: _Attributes = {
            "checkpoint.step": event.step,
            "checkpoint.url": event.url,
            "checkpoint.world_size": event.world_size,
            "checkpoint.requests": event.requests,
            "checkpoint.retries": event.retries,
            **about,
        }
        began_at = event.at - timedelta(seconds=event.seconds)
        span = self._tracer.start_span(name, start_time=int(began_at.timestamp() * 1e9), attributes=attributes)
        if error is not None:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))
        span.end(end_time=int(event.at.timestamp() * 1e9))
