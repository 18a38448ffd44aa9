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
from cloudckpt.store import Store, Traffic

__all__ = ["MONTH_S", "Prices", "money", "prices_from"]

MONTH_S = 365.25 / 12 * 86_400
_LIMIT_BYTES = 64 << 10
_HOSTS = {"s3": ".amazonaws.com", "gs": ".googleapis.com"}


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a store asks for.

    Attributes:
        storage_gib_month: for one GiB (2³⁰ bytes, which clouds call a GB) kept for a month.
        writes_1000: for 1,000 requests that write or list.
        reads_1000: for 1,000 other requests but deletes, which are free.
        sent_gib: for one GiB that the store sends; inside its region most send for nothing.
        currency: of all.
        source: where they come from and when, for people.
    """

    storage_gib_month: float
    writes_1000: float
    reads_1000: float = 0.0
    sent_gib: float = 0.0
    currency: str = "USD"
    source: str = ""

    @classmethod
    def of(cls, store: Store) -> Self | None:
        """Return the usual ones of what a URL names; None where none are known, as of a server of one's own."""
        scheme = store.url.partition(":")[0]
        host = store.endpoint.partition("://")[2].partition("/")[0].partition(":")[0]
        if scheme not in _HOSTS or (host and not host.endswith(_HOSTS[scheme])):
            return None
        return cls.usual(scheme)

    @classmethod
    def usual(cls, scheme: str) -> Self:
        """Return the usual ones of S3 (`s3`) or GCS (`gs`).

        Raises:
            KeyError: none are known for `scheme`.
        """
        storage_gib_month, source = {
            "s3": (0.023, "S3 Standard in us-east-1, the first 50 TB; aws.amazon.com/s3/pricing as of 2025"),
            "gs": (0.020, "Standard storage in us-central1; cloud.google.com/storage/pricing as of 2025"),
        }[scheme]
        return cls(storage_gib_month=storage_gib_month, writes_1000=0.005, reads_1000=0.0004, source=source)

    def cost(self, *, writes: int, reads: int, sent_bytes: int = 0) -> float:
        """Return what so many requests cost, and so many bytes that the store sends."""
        return (writes * self.writes_1000 + reads * self.reads_1000) / 1_000 + sent_bytes / 2**30 * self.sent_gib

    def cost_of(self, traffic: Traffic) -> float:
        """Return what requests cost: puts and lists as writes, gets and heads as reads, deletes nothing."""
        return self.cost(
            writes=traffic.puts + traffic.lists,
            reads=traffic.gets + traffic.heads,
            sent_bytes=traffic.received_bytes,
        )


def money(amount: float, currency: str) -> str:
    """Return a price; a small one with as many digits as it takes to see it."""
    digits = f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"
    return f"{digits} {currency}"


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
    told = (prices.storage_gib_month, prices.writes_1000, prices.reads_1000, prices.sent_gib)
    if not all(0 <= price < math.inf for price in told):
        raise OptionsError(f"a price in {os.fspath(path)} is below 0")
    return prices if prices.source else msgspec.structs.replace(prices, source=os.fspath(path))
