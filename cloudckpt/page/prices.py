"""Say what a store costs by a table of prices: a default for S3 and GCS, or the caller's own.

Pure values but for the file of the caller's. Prices differ by region, class and contract, and they change: a page
always says which ones it has taken, and where they come from.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Self

import msgspec

from cloudckpt.errors import OptionsError
from cloudckpt.store import Store

__all__ = ["MONTH_S", "Prices", "prices_from"]

MONTH_S = 365.25 / 12 * 86_400
_LIMIT_BYTES = 64 << 10
_HOSTS = {"s3": ".amazonaws.com", "gs": ".googleapis.com"}


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a store asks for.

    Attributes:
        storage_gib_month: for one GiB (2³⁰ bytes, which clouds call a GB) kept for a month.
        writes_1000: for 1,000 requests that write or list.
        currency: of both.
        source: where they come from and when, for people.
    """

    storage_gib_month: float
    writes_1000: float
    currency: str = "USD"
    source: str = ""

    @classmethod
    def of(cls, store: Store) -> Self | None:
        """Return the usual ones of what a URL names; None where none are known, as of a server of one's own."""
        scheme = store.url.partition(":")[0]
        host = store.endpoint.partition("://")[2].partition("/")[0].partition(":")[0]
        if scheme not in _HOSTS or (host and not host.endswith(_HOSTS[scheme])):
            return None
        if scheme == "s3":
            source = "S3 Standard in us-east-1, the first 50 TB; aws.amazon.com/s3/pricing as of 2025"
            return cls(storage_gib_month=0.023, writes_1000=0.005, source=source)
        source = "Standard storage in us-central1, class A operations; cloud.google.com/storage/pricing as of 2025"
        return cls(storage_gib_month=0.020, writes_1000=0.005, source=source)


def prices_from(path: str | os.PathLike[str]) -> Prices:
    """Read prices from a JSON file: an object with the fields of `Prices`.

    Raises:
        OptionsError: it cannot be read, or says something else.
    """
    try:
        with Path(path).open("rb") as file:
            prices = msgspec.json.decode(file.read(_LIMIT_BYTES), type=Prices)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise OptionsError(
            f"the prices in {os.fspath(path)} cannot be taken ({exc}); write for example "
            '{"storage_gib_month": 0.023, "writes_1000": 0.005, "currency": "USD", "source": "our contract"}'
        ) from exc
    if not all(0 <= price < math.inf for price in (prices.storage_gib_month, prices.writes_1000)):
        raise OptionsError(f"a price in {os.fspath(path)} is below 0")
    return prices if prices.source else msgspec.structs.replace(prices, source=os.fspath(path))
