"""Hand out credentials as a cloud's own services do: keys of a container's role, tokens of a service account."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

__all__ = ["CredentialService", "credential_service"]


class CredentialService:
    """Counts what it hands out: the n-th credentials carry n.

    Attributes:
        url: where to ask.
        lifetime_s: seconds until what it hands out expires.
        count: how often it was asked.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.lifetime_s = 3600.0
        self.count = 0

    def answer(self) -> dict[str, object]:
        """Return the next credentials, readable by botocore and by google-auth alike."""
        self.count += 1
        expiry = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        return {
            "AccessKeyId": f"CANARYKEYID{self.count:09}",
            "SecretAccessKey": f"CANARYSECRET{self.count:09}",
            "Token": f"CANARYTOKEN{self.count:09}",
            "Expiration": expiry.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "access_token": f"CANARYTOKEN{self.count:09}",
            "expires_in": int(self.lifetime_s),
            "token_type": "Bearer",
        }

    def service_account(self, directory: Path) -> str:
        """Write the key file of a service account whose tokens come from here."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = directory / "account.json"
        account = {
            "type": "service_account",
            "project_id": "p",
            "private_key_id": "1",
            "private_key": pem.decode(),
            "client_email": "tests@p.iam.example",
            "token_uri": self.url,
        }
        path.write_text(json.dumps(account))
        return str(path)


@contextmanager
def credential_service() -> Iterator[CredentialService]:
    """Serve credentials on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(service.answer()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - http.server looks for this name

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        service = CredentialService(f"http://127.0.0.1:{http.server_address[1]}/credentials")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield service
        http.shutdown()
        thread.join()
