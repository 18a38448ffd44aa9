"""Ask the metadata servers of EC2, GCE and Azure whether they will take this machine away.

    endpoint ──HTTP, one bounded request──▶ Reply ──what the provider documents──▶ notices

Link-local HTTP, so never by way of a proxy, never after a redirect, with few bytes and a deadline over the whole
exchange. What differs in anything from the documented form is no answer, and keeps nothing else from being asked or
read: an error of one question, or of one event, is raised when all others were heard. Which machine this is is read
from the DMI tables that the kernel shows: on any other, nothing is asked.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import quote, urlsplit

from cloudckpt.errors import OptionsError
from cloudckpt.preemption.notices import Notice, PartError, SourceError

__all__ = ["DMI", "AzureSource", "Ec2Source", "GceSource", "is_azure", "is_ec2", "is_gce"]

DMI = Path("/sys/class/dmi/id")

# By its address, because a name server may hang.
_LINK_LOCAL = "http://169.254.169.254"
_TIMEOUT_S = 2.0
_MOST_BODY_BYTES = 64 * 1024
_TOKEN_TTL_S = 21_600
# EC2 warns 2 minutes ahead; a time far outside of that is a mistake of somebody's, not a notice.
_MOST_PAST_S = 300.0
_MOST_AHEAD_S = 3_600.0
# From the preemption on.
_PREEMPTED_S = 30.0
# How long GCE is to hold a question back while it has no news.
_HELD_S = 20.0
# An answer that came sooner was not held back.
_AT_ONCE_S = 0.5
# Azure turns scheduled events on with the first question, which it answers within 2 minutes.
_AZURE_FIRST_S = 125.0
# Azure announces some maintenance days ahead.
_AZURE_LEAD_S = 120.0
_AZURE_CHASSIS = "7783-7084-3265-9085-8269-3286-77"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """One answer, its body read to the end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace").strip()


class _HurriedSocket(socket.socket):
    """A socket of which all reads together end by a deadline; a socket's own time-out starts again with each byte."""

    deadline_s = 0.0

    def recv_into(self, *args: object) -> int:
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left_s)
        return super().recv_into(*args)  # type: ignore[arg-type]


class _Endpoint:
    """A metadata server."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise OptionsError(f"endpoint is {url!r}; give http:// and a host, without a path")
        if not timeout_s > 0:
            raise OptionsError(f"timeout_s is {timeout_s}; give a number of seconds above 0")
        self._host, self._port = parts.hostname, parts.port or 80
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None
        self.url = url.rstrip("/")

    def hang_up(self) -> None:
        """End the exchange under way with an error; in any thread."""
        if (sock := self._sock) is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def ask(self, path: str, headers: Mapping[str, str], *, method: str = "GET", more_s: float = 0.0) -> _Reply:
        """Exchange one request within the time-out and `more_s`, on a connection of its own."""
        timeout_s = self._timeout_s + more_s
        deadline_s = time.monotonic() + timeout_s
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.connect()
            sock = self._sock = _HurriedSocket(fileno=connection.sock.detach())
            sock.settimeout(timeout_s)
            sock.deadline_s = deadline_s
            connection.sock = sock
            connection.request(method, path, headers=dict(headers))
            # Closed also where it cannot be read: it holds the socket open.
            with connection.getresponse() as response:
                body = response.read(_MOST_BODY_BYTES + 1)
                named = {name.lower(): value for name, value in response.getheaders()}
                status = response.status
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise SourceError(f"no answer from {self.url}{path}: {type(exc).__name__}: {exc}") from exc
        finally:
            self._sock = None
            connection.close()
        if len(body) > _MOST_BODY_BYTES:
            raise SourceError(f"{self.url}{path} answered with more than {_MOST_BODY_BYTES} bytes")
        return _Reply(status=status, headers=named, body=body)

    def misfit(self, path: str, reply: _Reply) -> SourceError:
        """Return the error for an answer that is none."""
        return SourceError(f"{self.url}{path} answered with status {reply.status} and {reply.text[:80]!r}")


_LIFECYCLE_STATES = {
    "InService": False,
    "Standby": False,
    "Detached": False,
    "Terminated": True,
    "Warmed:Running": False,
    "Warmed:Stopped": True,
    "Warmed:Hibernated": True,
    "Warmed:Terminated": True,
}
"""Where an instance of an Auto Scaling group may be on its way to, and whether it ends there."""


class Ec2Source:
    """The interruption notice and the rebalance recommendation of a Spot Instance, by IMDSv2.

    Documented in the Amazon EC2 User Guide: "Spot Instance interruption notices" (`spot/instance-action`: 404, or
    JSON with `action` and `time`, two minutes ahead but for hibernation), "EC2 instance rebalance recommendations"
    (`events/recommendations/rebalance`: 404, or JSON with `noticeTime`) and "Use the Instance Metadata Service"
    (a token by PUT; 401 once it is no longer valid). A recommendation comes when the risk has risen, without a time
    and often without an interruption after it: it is a notice of the kind `advice`. And in that of EC2 Auto Scaling:
    "Retrieve the target lifecycle state through instance metadata" (`autoscaling/target-lifecycle-state`: 404 outside
    of a group; whither the instance is on its way, as long as the group's lifecycle hook, if it has one, lets it live).
    """

    name = "ec2"

    def __init__(
        self,
        *,
        endpoint: str = _LINK_LOCAL,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Ask the metadata server at `endpoint`; each request ends within `timeout_s`.

        `wall_clock` is used only if an answer does not say by its `Date` what time it is.
        """
        self._endpoint = _Endpoint(endpoint, timeout_s=timeout_s)
        self._clock = clock
        self._wall_clock = wall_clock
        self._token = ""
        self._is_token_new = False

    def poll(self) -> Iterator[Notice]:
        self._is_token_new = False
        self._need_token()
        failures: list[SourceError] = []
        questions = (self._action, self._lifecycle, self._recommendation)
        for ask in questions:
            try:
                notice = ask()
            except SourceError as exc:
                failures.append(exc)
                continue
            if notice is not None:
                yield notice
        if failures:
            self._token = ""  # it may be why
            _raise_all(failures, is_part=len(failures) < len(questions))

    def hang_up(self) -> None:
        self._endpoint.hang_up()

    def _action(self) -> Notice | None:
        path = "/latest/meta-data/spot/instance-action"
        reply = self._get(path)
        if reply is None:
            return None
        said = _json_object(reply)
        action, at_s = said.get("action"), _utc_s(said.get("time"))
        if action not in ("terminate", "stop", "hibernate") or at_s is None:
            raise self._endpoint.misfit(path, reply)
        # Between two times of the same server no wrong clock of this machine can come.
        left_s = at_s - (_date_s(reply) or self._wall_clock())
        if not -_MOST_PAST_S <= left_s <= _MOST_AHEAD_S:
            raise SourceError(f"EC2 gives {said['time']} as the time of interruption, {left_s:.0f} s from now")
        now_s = self._clock()
        return Notice(
            source="ec2 spot instance-action",
            reason=f"EC2 will {action} this Spot Instance at {said['time']}",
            deadline_s=now_s + max(0.0, left_s),
            received_s=now_s,
        )

    def _lifecycle(self) -> Notice | None:
        path = "/latest/meta-data/autoscaling/target-lifecycle-state"
        reply = self._get(path)
        if reply is None:
            return None
        state = reply.text
        if state not in _LIFECYCLE_STATES:
            raise self._endpoint.misfit(path, reply)
        if not _LIFECYCLE_STATES[state]:
            return None
        return Notice(
            source="ec2 auto scaling",
            reason=f"its Auto Scaling group has this instance on its way to {state}",
            deadline_s=None,
            received_s=self._clock(),
        )

    def _recommendation(self) -> Notice | None:
        path = "/latest/meta-data/events/recommendations/rebalance"
        reply = self._get(path)
        if reply is None:
            return None
        noticed = _json_object(reply).get("noticeTime")
        if _utc_s(noticed) is None:
            raise self._endpoint.misfit(path, reply)
        return Notice(
            source="ec2 rebalance recommendation",
            reason=f"EC2 said at {noticed} that this Spot Instance is at a higher risk of interruption",
            deadline_s=None,
            received_s=self._clock(),
            kind="advice",
        )

    def _get(self, path: str) -> _Reply | None:
        """Return an answer, None for a 404: there is no such notice."""
        reply = self._get_once(path)
        if reply.status == 401 and not self._is_token_new:
            self._token = ""
            reply = self._get_once(path)
        if reply.status == 404:
            return None
        if reply.status != 200:
            raise self._endpoint.misfit(path, reply)
        return reply

    def _get_once(self, path: str) -> _Reply:
        self._need_token()
        return self._endpoint.ask(path, {"X-aws-ec2-metadata-token": self._token})

    def _need_token(self) -> None:
        if not self._token:
            self._token, self._is_token_new = self._new_token(), True

    def _new_token(self) -> str:
        path, ttl = "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
        try:
            reply = self._endpoint.ask(path, ttl, method="PUT")
        except SourceError as exc:
            raise SourceError(f"{exc} (in a container, the instance's metadata hop limit must be 2)") from exc
        token = reply.text
        if reply.status != 200 or not token or len(token) > 1024 or not (token.isascii() and token.isprintable()):
            raise self._endpoint.misfit(path, reply)
        return token


class GceSource:
    """The preemption, or the host maintenance, of a Compute Engine machine; each is a source of its own, as it waits.

    Documented by Google Cloud: "Create and use Spot VMs" (`instance/preempted`: TRUE once it is being preempted, of
    which it has 30 s), "Query metadata server for maintenance event notices" and "Handle GPU host maintenance events"
    (`instance/maintenance-event`: NONE, MIGRATE_ON_HOST_MAINTENANCE, which a process outlives, or
    TERMINATE_ON_HOST_MAINTENANCE, an hour ahead on machines with GPUs and 60 s on others), and "View and query VM
    metadata" (`wait_for_change=true`, `last_etag`, `timeout_sec`: the answer is held back until there is news). What
    lacks the header `Metadata-Flavor: Google` was not said by the metadata server. Where a question that is to be held
    back gets no proper answer, or one at once, as from an emulator or a proxy, the next one is asked now and then only.

    Attributes:
        waits: whether the last question was held back, or none was yet, so that the next one may follow at once.
    """

    def __init__(
        self,
        key: Literal["preempted", "maintenance-event"] = "preempted",
        *,
        endpoint: str = _LINK_LOCAL,
        timeout_s: float = _TIMEOUT_S,
        held_s: float = _HELD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask for `key` at `endpoint`; a request ends within `timeout_s`, and `held_s` more if it is held back."""
        self.name = f"gce {key}"
        self.waits = False
        self._key = key
        self._endpoint = _Endpoint(endpoint, timeout_s=timeout_s)
        self._held_s = held_s
        self._clock = clock
        self._etag = ""
        self._can_hold = True
        self._quiet_s: float | None = None

    def poll(self) -> Iterator[Notice]:
        value, was_held = self._value()
        now_s = self._clock()
        if value not in _GCE_ENDS:
            self._quiet_s = now_s
            return
        # What was held back is told at the moment; otherwise it has happened since it was last asked for.
        given_s = now_s if was_held or self._quiet_s is None else self._quiet_s
        reason, leaves_s = _GCE_ENDS[value]
        deadline_s = None if leaves_s is None else max(now_s, given_s + leaves_s)
        yield Notice(source=self.name, reason=reason, deadline_s=deadline_s, received_s=now_s)

    def hang_up(self) -> None:
        self._endpoint.hang_up()

    def _value(self) -> tuple[str, bool]:
        """Return the value, and whether the question was held back until now; at once if it cannot be."""
        self.waits = False
        if not self._etag:
            value = self._asked("")
            # From the second such question on, one that was to be held back has failed.
            self.waits, self._can_hold = bool(self._etag) and self._can_hold, False
            return value, False
        query = f"?wait_for_change=true&timeout_sec={math.ceil(self._held_s)}&last_etag={quote(self._etag)}"
        began_s = self._clock()
        try:
            value = self._asked(query, more_s=self._held_s)
        except SourceError:
            self._etag = ""
            return self._asked(""), False
        # Whatever its ETag is: one that changes with each answer is no news.
        was_held = self._clock() - began_s > _AT_ONCE_S
        self.waits = self._can_hold = bool(self._etag) and was_held
        return value, was_held

    def _asked(self, query: str, *, more_s: float = 0.0) -> str:
        path = f"/computeMetadata/v1/instance/{self._key}"
        reply = self._endpoint.ask(path + query, {"Metadata-Flavor": "Google"}, more_s=more_s)
        is_google = reply.headers.get("metadata-flavor") == "Google"
        if reply.status != 200 or not is_google or reply.text not in _GCE_VALUES[self._key]:
            raise self._endpoint.misfit(path, reply)
        self._etag = reply.headers.get("etag", "")
        return reply.text


_GCE_VALUES = {
    "preempted": ("TRUE", "FALSE"),
    "maintenance-event": ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"),
}
_GCE_ENDS: dict[str, tuple[str, float | None]] = {
    "TRUE": ("Compute Engine preempts this machine", _PREEMPTED_S),
    "TERMINATE_ON_HOST_MAINTENANCE": ("Compute Engine will stop this machine for host maintenance", None),
}
"""What says that the machine ends: in words, and the seconds that it leaves."""


class AzureSource:
    """The scheduled events of an Azure machine that end what runs on it.

    Documented by Microsoft: "Azure Metadata Service: Scheduled Events for Linux VMs" (`scheduledevents`, with the
    header `Metadata: true`: `Events`, each with `EventId`, `EventType`, `EventStatus`, `NotBefore`, empty once it has
    started, and `Resources`, because all machines of a set are told; the first answer takes up to 2 minutes) and "Azure
    Instance Metadata Service" (`compute/name`: which of them this is). Preempt comes 30 s ahead, Terminate 5 to 15
    minutes, Reboot and Redeploy from 10 minutes to days. A Freeze is outlived.
    """

    name = "azure"
    patience_s = 2 * _AZURE_FIRST_S

    def __init__(
        self,
        *,
        endpoint: str = _LINK_LOCAL,
        timeout_s: float = _TIMEOUT_S,
        lead_s: float = _AZURE_LEAD_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Ask the metadata server at `endpoint`; give notice `lead_s` seconds before the event at most.

        Each request but the first ends within `timeout_s`. `wall_clock` is used only if an answer does not say by its
        `Date` what time it is.
        """
        self._endpoint = _Endpoint(endpoint, timeout_s=timeout_s)
        self._lead_s = lead_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._first_s = _AZURE_FIRST_S
        self._machine = ""

    def poll(self) -> Iterator[Notice]:
        if not self._machine:
            self._machine = self._asked("/metadata/instance/compute/name?api-version=2021-02-01&format=text").text
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        first_s, self._first_s = self._first_s, 0.0
        reply = self._asked(path, more_s=first_s)
        events = _json_object(reply).get("Events")
        if not isinstance(events, list):
            raise self._endpoint.misfit(path, reply)
        failures: list[SourceError] = []
        for event in events:
            try:
                notice = self._notice(reply, event)
            except SourceError as exc:
                failures.append(exc)
                continue
            if notice is not None:
                yield notice
                if notice.deadline_s is None:
                    failures.append(_odd_event(event))
        if failures:
            _raise_all(failures, is_part=True)

    def hang_up(self) -> None:
        self._endpoint.hang_up()

    def _notice(self, reply: _Reply, event: object) -> Notice | None:
        """Return the notice that an event is, None if it does not end this machine soon; raises if it cannot be read.

        One without a time that can be read is none of those: it ends this machine, nobody knows when.
        """
        if not isinstance(event, dict) or not isinstance(event.get("Resources"), list):
            raise _odd_event(event)
        kind = event.get("EventType")
        if self._machine not in event["Resources"] or kind == "Freeze":
            return None
        if kind not in ("Preempt", "Terminate", "Reboot", "Redeploy"):
            raise _odd_event(event)
        wall_s = _date_s(reply) or self._wall_clock()
        not_before = event.get("NotBefore") or ""
        at_s = (_rfc_s(not_before) or _utc_s(not_before)) if not_before else wall_s
        if at_s is not None and at_s - wall_s > self._lead_s:
            return None
        now_s = self._clock()
        when = f"not before {not_before}" if not_before else "now"
        return Notice(
            source=f"azure {kind}",
            reason=f"Azure announces {kind} of this machine, {when} (event {event.get('EventId')})",
            deadline_s=None if at_s is None else now_s + max(0.0, at_s - wall_s),
            received_s=now_s,
        )

    def _asked(self, path: str, *, more_s: float = 0.0) -> _Reply:
        reply = self._endpoint.ask(path, {"Metadata": "true"}, more_s=more_s)
        if reply.status != 200 or not reply.body:
            raise self._endpoint.misfit(path, reply)
        return reply


def is_ec2(dmi: Path, environ: Mapping[str, str]) -> bool:
    """Tell whether this is an EC2 instance, by the names that its DMI tables carry.

    Never if AWS_EC2_METADATA_DISABLED, which the AWS SDKs heed, forbids to ask.
    """
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    vendors = {_dmi(dmi, name) for name in ("sys_vendor", "board_vendor", "bios_vendor")}
    # Instances on Xen name no vendor of their own.
    return "Amazon EC2" in vendors or _dmi(dmi, "bios_version").endswith(".amazon")


def is_gce(dmi: Path) -> bool:
    """Tell whether this is a Compute Engine machine, by the name that its DMI tables carry."""
    return _dmi(dmi, "product_name") == "Google Compute Engine"


def is_azure(dmi: Path) -> bool:
    """Tell whether this is an Azure machine, by the asset tag that all of them carry, and no other Hyper-V's."""
    return _dmi(dmi, "chassis_asset_tag") == _AZURE_CHASSIS


def _dmi(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _raise_all(failures: Sequence[SourceError], *, is_part: bool) -> NoReturn:
    """Raise one error for all questions that got no answer; of a part, if others got one."""
    kind = PartError if is_part else SourceError
    raise kind("; ".join(map(str, failures))) from failures[0]


def _odd_event(event: object) -> SourceError:
    return SourceError(f"Azure's event cannot be read: {event!r:.300}")


def _json_object(reply: _Reply) -> Mapping[str, object]:
    """Return the body as an object; an empty one for anything else."""
    try:
        value = json.loads(reply.body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _utc_s(text: object) -> float | None:
    """Return the Unix seconds of `2017-09-18T08:22:00Z`; None for anything else."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _date_s(reply: _Reply) -> float | None:
    """Return what time it is by the answer itself."""
    return _rfc_s(reply.headers.get("date", ""))


def _rfc_s(text: object) -> float | None:
    """Return the Unix seconds of `Mon, 19 Sep 2016 18:29:47 GMT`; None for anything else."""
    try:
        return parsedate_to_datetime(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None
