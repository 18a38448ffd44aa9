"""Hand obstore credentials that are found and renewed as s3fs and gcsfs find and renew theirs.

    verb ──▶ ensure() on the caller's thread ──▶ botocore | google-auth: environment, profile, SSO, web identity,
                                                  container, instance; renewed before they end
    obstore ──▶ provider() ──▶ the same, which by then are at hand

A failure thus shows in `ensure`, as the library's own exception, and not inside obstore, which would tell it as text.
Credentials live in these objects alone: never in a store's configuration, its repr or its pickle. Keeps FORMAT 16.
Any thread may enter.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from botocore.credentials import Credentials as AwsKeys
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import NoCredentialsError, PartialCredentialsError

from cloudckpt.errors import OptionsError
from cloudckpt.store.classify import CredentialKind
from cloudckpt.store.redact import remember_secrets

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials
    from gcsfs.credentials import GoogleCredentials
    from obstore.store import GCSCredential, S3Credential

__all__ = ["AwsCredentials", "GcsCredentials", "check_aws_keys", "check_text", "check_texts"]

# obstore keeps what it was given for so long before it asks again; when to renew is decided below, not there.
_ASK_AGAIN_S = 60.0
# Not sent as it stands: a customer's key may be raw bytes.
_ENCODED = frozenset({"SSECustomerKey"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_text(name: str, text: str | None) -> None:
    """Refuse a key or token that no header can carry; obstore would panic, which is no `Exception`."""
    if text and not (text.isascii() and text.isprintable()):
        raise OptionsError(_unsendable(name))


def check_texts(options: Mapping[str, object], where: str = "storage_options") -> None:
    """Refuse options with line breaks and other control characters, by name."""
    for name, value in options.items():
        if isinstance(value, Mapping) and name != "token":  # gcsfs takes a key file's contents there
            check_texts(value, f"{where}[{name!r}]")
        elif isinstance(value, str) and name not in _ENCODED and _CONTROL.search(value):
            raise OptionsError(_unsendable(f"{where}[{name!r}]"))


def check_aws_keys(frozen: ReadOnlyCredentials) -> None:
    """Refuse keys, wherever they were found, that no header can carry."""
    check_text("the access key id", frozen.access_key)
    check_text("the secret key", frozen.secret_key)
    check_text("the session token", frozen.token)


def _unsendable(name: str) -> str:
    return (
        f"{name} holds a line break or another character that no request can carry (it is not repeated here); see "
        "whether the file or variable that it came from ends with a line break"
    )


class AwsCredentials:
    """The keys of one botocore session, or those that were given."""

    def __init__(self, find: Callable[[], AwsKeys | None]) -> None:
        """Take how to find the keys; it is called once, at the first `ensure`."""
        self._find = find
        self._lock = threading.Lock()
        self._keys: AwsKeys | None = None
        self._is_renewed = True

    @classmethod
    def given(cls, key: str | None, secret: str | None, token: str | None) -> AwsCredentials:
        """Return credentials that never change."""
        if not key or not secret:
            raise PartialCredentialsError(provider="storage_options", cred_var="secret" if key else "key")
        credentials = cls(lambda: AwsKeys(key, secret, token))
        credentials._is_renewed = False
        return credentials

    def ensure(self) -> None:
        self._frozen()

    @property
    def kind(self) -> CredentialKind | None:
        """Whether they can expire, as a session's token does; None before they are found."""
        with self._lock:
            keys = self._keys
        if keys is None:
            return None
        # Asked for its token, one that is refreshable would be refreshed.
        return "temporary" if isinstance(keys, RefreshableCredentials) or keys.token else "lasting"

    def __call__(self) -> S3Credential:
        key, secret, token = self._frozen()
        return {
            "access_key_id": key,
            "secret_access_key": secret,
            "token": token,
            "expires_at": _soon() if self._is_renewed else None,
        }

    def __repr__(self) -> str:
        return "AwsCredentials(…)"

    def _frozen(self) -> tuple[str, str, str | None]:
        with self._lock:
            if self._keys is None:
                self._keys = self._find()
            keys = self._keys
        if keys is None:
            raise NoCredentialsError
        frozen = keys.get_frozen_credentials()  # botocore renews here, well before the end
        check_aws_keys(frozen)
        remember_secrets({"secret": frozen.secret_key, "token": frozen.token})
        return frozen.access_key, frozen.secret_key, frozen.token


class GcsCredentials:
    """The token that gcsfs would send."""

    def __init__(self, credentials: GoogleCredentials) -> None:
        self._credentials = credentials

    kind: CredentialKind = "temporary"

    def ensure(self) -> None:
        self._credentials.maybe_refresh()
        check_text("the Google access token", self._credentials.credentials.token)

    def __call__(self) -> GCSCredential:
        self.ensure()
        token: str = self._credentials.credentials.token
        remember_secrets({"token": token})
        return {"token": token, "expires_at": _soon()}

    def __repr__(self) -> str:
        return "GcsCredentials(…)"


def _soon() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=_ASK_AGAIN_S)
