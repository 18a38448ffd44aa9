"""Nothing that is, or looks like, a credential stays in a text."""

from __future__ import annotations

import base64
import json
import logging
import re
from urllib.parse import quote, quote_plus

import pytest

from cloudckpt.store.location import parse_location
from cloudckpt.store.redact import hide, hide_in_logs, remember_secrets

SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "text",
    [
        f"x-amz-security-token:{SECRET}\nhost:h",
        f"{{'X-Amz-Security-Token': b'{SECRET}', 'host': 'h'}}",
        f"'Authorization': 'AWS4-HMAC-SHA256 Credential={SECRET}/2026/eu/s3/aws4_request, Signature={SECRET}'",
        f"Authorization: Bearer {SECRET}",
        f"'x-amz-server-side-encryption-customer-key': '{SECRET}'",
        f"<Error><Token-0>{SECRET}</Token-0></Error>",
        f"<AccessKeyId>{SECRET}</AccessKeyId><SessionToken>{SECRET}</SessionToken>",
        f'{{"AccessKeyId": "x", "SecretAccessKey": "{SECRET}", "Token" : "{SECRET}"}}',
        f"{{'SSECustomerKey': '{SECRET}'}}",
        f"{{'SSECustomerKey': b'{SECRET}'}}",
        f"https://bucket.s3.amazonaws.com/k?X-Amz-Signature={SECRET}&X-Amz-Date=1",
        f"http://user:{SECRET}@proxy:3128/",
    ],
)
def test_the_shapes_of_credentials_are_blotted_out(text: str) -> None:
    assert SECRET not in hide(text)


def test_what_is_no_credential_stays() -> None:
    text = "put of 'a/b' in s3://bucket/root failed (503 SlowDown) at http://127.0.0.1:9000/bucket/a"
    assert hide(text) == text


def test_given_secrets_are_hidden_wherever_they_turn_up() -> None:
    remember_secrets({"client_kwargs": {"aws_secret_access_key": "nested-secret-1"}, "password": "flat-secret-2"})
    assert hide("said nested-secret-1 and flat-secret-2") == "said *** and ***"


ODD = "/tmp/a key+é ü\"'%=?&~.json\\"
ENCODINGS = {
    "as it is": str,
    "quote": quote,
    "quote all": lambda text: quote(text, safe=""),
    "quote in lower case": lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
    "form": quote_plus,
    "json": lambda text: json.dumps(text)[1:-1],
    "json as text": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "json with slashes": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "json of json": lambda text: json.dumps(json.dumps(text))[3:-3],
    "repr": lambda text: repr(text)[1:-1],
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("secret", [ODD, "plain-secret-3", "a" * 2000 + "/+="])
def test_given_secrets_are_hidden_in_whatever_form_they_turn_up(encoding: str, secret: str) -> None:
    remember_secrets({"token": secret})
    encoded = ENCODINGS[encoding](secret)
    hidden = hide(f"GET /x failed: token {encoded} is none")
    assert hidden.startswith("GET /x failed: token ***")
    assert hidden.endswith(" is none")
    assert len(hidden) <= len("GET /x failed: token *** is none") + len("====")


@pytest.mark.parametrize("user", ["u", "us", "use", "user"])
def test_a_given_secret_behind_a_name_is_hidden_in_base64(user: str) -> None:
    remember_secrets({"password": "a-pass-word-4"})
    encoded = base64.b64encode(f"{user}:a-pass-word-4".encode()).decode()
    hidden = hide(f"said {encoded}")
    assert "***" in hidden
    assert b"pass-word" not in base64.b64decode(hidden.removeprefix("said ").partition("***")[0] + "==")


def test_a_token_in_a_query_is_hidden_whatever_it_is() -> None:
    assert hide("tokeninfo?access_token=%2Ftmp%2Fx.json: 400") == "tokeninfo?access_token=*** 400"


def test_short_values_and_names_of_accounts_are_no_secrets() -> None:
    remember_secrets({"key": "cloudckpt", "secret": "test", "endpoint_url": "http://127.0.0.1:9000"})
    assert hide("cloudckpt test http://127.0.0.1:9000") == "cloudckpt test http://127.0.0.1:9000"


def test_libraries_log_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    hide_in_logs()
    hide_in_logs()
    caplog.set_level(logging.DEBUG)
    for name in ("botocore.auth", "botocore.endpoint", "s3fs", "gcsfs", "urllib3"):
        logging.getLogger(name).debug("CanonicalRequest:\nx-amz-security-token:%s", SECRET)
    assert SECRET not in caplog.text
    assert caplog.text.count("x-amz-security-token:***") == 5


def test_an_error_that_a_library_logs_is_shown_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    remember_secrets({"secret": SECRET})
    hide_in_logs()
    caplog.set_level(logging.DEBUG)
    try:
        raise ValueError(f"550 {SECRET} what is that?")  # noqa: TRY301
    except ValueError:
        logging.getLogger("botocore.endpoint").debug("Exception received", exc_info=True)
    assert SECRET not in caplog.text
    assert "what is that?" in caplog.text


def test_the_access_point_of_an_arn_is_the_bucket() -> None:
    for arn in (
        "arn:aws:s3:eu-west-1:123456789012:accesspoint/name",
        "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/name",
    ):
        found = parse_location(f"s3://{arn}/run/7/")
        assert (found.bucket, found.prefix) == (arn, "run/7")
