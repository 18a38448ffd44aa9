"""Ask the metadata servers of EC2 and GCE whether they will take this machine away.

    endpoint ──HTTP, one bounded request──▶ Reply ──what the provider documents──▶ notices

Link-local HTTP, so never by way of a proxy, never after a redirect, with few bytes and a deadline over the whole
exchange. What differs in anything from the documented form is no answer. Which machine this is is read from the DMI
tables that the kernel shows: on any other, nothing is asked.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from cloudckpt.errors import OptionsError
from cloudckpt.preemption.notices import Notice, SourceError

__all__ = ["DMI", "Ec2Source", "GceSource", "is_ec2", "is_gce"]

DMI = Path("/sys/class/dmi/id")

# By its address, because a name server may hang.
_LINK_LOCAL = "http://169.254.169.254"
_TIMEOUT_S = 2.0
_MOST_BODY_BYTES = 64 * 1024
_TOKEN_TTL_S = 21_600
# EC2 warns 2 minutes ahead; a time far outside of that is a mistake of somebody's, not a notice.
_MOST_PAST_S = 300.0
_MOST_AHEAD_S = 3_600.0
# From the preemption on, which is seen a little later.
_PREEMPTED_S = 30.0


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
        self.url = url.rstrip("/")

    def ask(self, path: str, headers: Mapping[str, str], *, method: str = "GET") -> _Reply:
        """Exchange one request within the time-out, on a connection of its own."""
        deadline_s = time.monotonic() + self._timeout_s
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.connect()
            sock = _HurriedSocket(fileno=connection.sock.detach())
            sock.settimeout(self._timeout_s)
            sock.deadline_s = deadline_s
            connection.sock = sock
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            body = response.read(_MOST_BODY_BYTES + 1)
            named = {name.lower(): value for name, value in response.getheaders()}
            status = response.status
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise SourceError(f"no answer from {self.url}{path}: {type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()
        if len(body) > _MOST_BODY_BYTES:
            raise SourceError(f"{self.url}{path} answered with more than {_MOST_BODY_BYTES} bytes")
        return _Reply(status=status, headers=named, body=body)

    def misfit(self, path: str, reply: _Reply) -> SourceError:
        """Return the error for an answer that is none."""
        return SourceError(f"{self.url}{path} answered with status {reply.status} and {reply.text[:80]!r}")


class Ec2Source:
    """The interruption notice and the rebalance recommendation of a Spot Instance, by IMDSv2.

    Documented in the Amazon EC2 User Guide: "Spot Instance interruption notices" (`spot/instance-action`: 404, or
    JSON with `action` and `time`, two minutes ahead but for hibernation), "EC2 instance rebalance recommendations"
    (`events/recommendations/rebalance`: 404, or JSON with `noticeTime`) and "Use the Instance Metadata Service"
    (a token by PUT; 401 once it is no longer valid). A recommendation comes when the risk has risen, without a time
    and often without an interruption after it: it is a notice of the kind `advice`.
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

    def poll(self) -> Iterator[Notice]:
        yield from filter(None, (ask() for ask in (self._action, self._recommendation)))

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
        is_new = not self._token
        reply = self._get_once(path)
        if reply.status == 401 and not is_new:
            self._token = ""
            reply = self._get_once(path)
        if reply.status == 404:
            return None
        if reply.status != 200:
            self._token = ""
            raise self._endpoint.misfit(path, reply)
        return reply

    def _get_once(self, path: str) -> _Reply:
        if not self._token:
            self._token = self._new_token()
        return self._endpoint.ask(path, {"X-aws-ec2-metadata-token": self._token})

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
    """The preemption and the host maintenance of a Compute Engine machine.

    Documented by Google Cloud: "Create and use Spot VMs" (`instance/preempted`: TRUE once it is being preempted, of
    which it has 30 s), "Query metadata server for maintenance event notices" and "Handle GPU host maintenance events"
    (`instance/maintenance-event`: NONE, MIGRATE_ON_HOST_MAINTENANCE, which a process outlives, or
    TERMINATE_ON_HOST_MAINTENANCE, an hour ahead on machines with GPUs and 60 s on others). Whatever lacks the header
    `Metadata-Flavor: Google` was not said by the metadata server.
    """

    name = "gce"

    def __init__(
        self,
        *,
        endpoint: str = _LINK_LOCAL,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask the metadata server at `endpoint`; each request ends within `timeout_s`."""
        self._endpoint = _Endpoint(endpoint, timeout_s=timeout_s)
        self._clock = clock

    def poll(self) -> Iterator[Notice]:
        if self._value("preempted", ("TRUE", "FALSE")) == "TRUE":
            yield self._notice("gce preempted", "Compute Engine preempts this machine", _PREEMPTED_S)
        events = ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")
        if self._value("maintenance-event", events) == "TERMINATE_ON_HOST_MAINTENANCE":
            reason = "Compute Engine will stop this machine for host maintenance"
            yield self._notice("gce maintenance-event", reason, None)

    def _notice(self, source: str, reason: str, left_s: float | None) -> Notice:
        now_s = self._clock()
        deadline_s = None if left_s is None else now_s + left_s
        return Notice(source=source, reason=reason, deadline_s=deadline_s, received_s=now_s)

    def _value(self, key: str, expected: tuple[str, ...]) -> str:
        path = f"/computeMetadata/v1/instance/{key}"
        reply = self._endpoint.ask(path, {"Metadata-Flavor": "Google"})
        is_google = reply.headers.get("metadata-flavor") == "Google"
        if reply.status != 200 or not is_google or reply.text not in expected:
            raise self._endpoint.misfit(path, reply)
        return reply.text


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


def _dmi(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


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
    try:
        return parsedate_to_datetime(reply.headers.get("date", "")).timestamp()
    except (ValueError, OverflowError):
        return None
