"""Hand obstore credentials that are found and renewed as s3fs and gcsfs find and renew theirs.

    verb ──▶ ensure() ──▶ errand, where there is something to ask ──▶ botocore | google-auth: environment, profile, SSO,
                                                         web identity, container, instance; renewed before they end
    obstore ──▶ provider() ──▶ the same, which by then are at hand

A failure thus shows in `ensure`, as the library's own exception, and not inside obstore, which would tell it as text;
and a service that does not answer takes no longer than the request may. Keys that still hold are used meanwhile.
Credentials live in these objects alone: never in a store's configuration, its repr or its pickle. Keeps FORMAT 16.
Any thread may enter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as AwsKeys
from botocore.credentials import ReadOnlyCredentials, RefreshableCredentials
from botocore.exceptions import NoCredentialsError, PartialCredentialsError

from cloudckpt.errors import OptionsError
from cloudckpt.store.classify import CredentialKind
from cloudckpt.store.facts import before_sending
from cloudckpt.store.limit import Errand
from cloudckpt.store.redact import remember_secrets

if TYPE_CHECKING:
    from gcsfs.credentials import GoogleCredentials
    from google.auth.credentials import Credentials as GoogleKeys
    from obstore.store import GCSCredential, S3Credential

__all__ = ["AwsCredentials", "GcsCredentials", "check_aws_keys", "check_text", "check_texts"]

# A token of Google's that ends so soon is renewed, as newer gcsfs do it, in seconds.
_RENEWED_BEFORE_S = 300
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
        self._errand: Errand[ReadOnlyCredentials] = Errand()
        self._keys: AwsKeys | None = None
        self._newest: ReadOnlyCredentials | None = None
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

    def authorise(self, url: str, headers: Mapping[str, str], *, region: str) -> dict[str, str]:
        """Return the headers of a get of S3's with what proves who asks in them."""
        request = AWSRequest(method="GET", url=url, headers=dict(headers))
        S3SigV4Auth(ReadOnlyCredentials(*self._frozen()), "s3", region).add_auth(request)
        return dict(request.headers)

    def __repr__(self) -> str:
        return "AwsCredentials(…)"

    def _frozen(self) -> tuple[str, str, str | None]:
        if self._keys is None or _ends(self._keys):
            frozen = self._renewed(self._keys)
        else:
            frozen = self._keys.get_frozen_credentials()
        check_aws_keys(frozen)
        remember_secrets({"secret": frozen.secret_key, "token": frozen.token})
        return frozen.access_key, frozen.secret_key, frozen.token

    def _renewed(self, keys: AwsKeys | None) -> ReadOnlyCredentials:
        try:
            return self._errand.run(self._renew)
        except TimeoutError:
            if keys is None or self._newest is None or _ends(keys, within_s=0):
                raise
            return self._newest

    def _renew(self) -> ReadOnlyCredentials:
        keys = self._find() if self._keys is None else self._keys
        if keys is None:
            raise NoCredentialsError
        self._newest = keys.get_frozen_credentials()  # botocore renews here, well before the end
        self._keys = keys
        return self._newest


def _ends(keys: AwsKeys, *, within_s: int | None = None) -> bool:
    """Tell whether keys end so soon, or so soon that botocore renews them."""
    return isinstance(keys, RefreshableCredentials) and keys.refresh_needed(within_s)


class GcsCredentials:
    """The token that gcsfs would send."""

    def __init__(self, credentials: GoogleCredentials) -> None:
        self._credentials = credentials
        self._errand: Errand[None] = Errand()

    kind: CredentialKind = "temporary"

    def ensure(self) -> None:
        found = self._credentials
        if found.credentials is not None and not _holds(found.credentials):
            self._errand.run(found.maybe_refresh)
        if found.credentials is not None:
            check_text("the Google access token", found.credentials.token)

    def authorise(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of a request with the token in them, if there are credentials."""
        with before_sending():
            self.ensure()
        authorised = dict(headers)
        # Not by gcsfs, which would ask for a token once more where all that the service has are near their end.
        if self._credentials.credentials is not None:
            self._credentials.credentials.apply(authorised)
        return authorised

    def __call__(self) -> GCSCredential:
        self.ensure()
        token: str = self._credentials.credentials.token
        remember_secrets({"token": token})
        return {"token": token, "expires_at": _soon()}

    def __repr__(self) -> str:
        return "GcsCredentials(…)"


def _holds(credentials: GoogleKeys) -> bool:
    """Tell whether a token need not be renewed yet; one of which nobody knows an end is never."""
    # Not asked of gcsfs: in some releases a token without an end is over, and in some it is sent until its last second.
    ends_at = credentials.expiry  # google-auth's times are UTC, and do not say so
    left = None if ends_at is None else ends_at.replace(tzinfo=UTC) - datetime.now(UTC)
    return bool(credentials.valid) and (left is None or left.total_seconds() > _RENEWED_BEFORE_S)


def _soon() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=_ASK_AGAIN_S)
