"""Nothing that is, or looks like, a credential stays in a text."""

from __future__ import annotations

import logging

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


def test_the_access_point_of_an_arn_is_the_bucket() -> None:
    for arn in (
        "arn:aws:s3:eu-west-1:123456789012:accesspoint/name",
        "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/name",
    ):
        found = parse_location(f"s3://{arn}/run/7/")
        assert (found.bucket, found.prefix) == (arn, "run/7")
