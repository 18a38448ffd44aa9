"""Turn requests and bytes that a store has counted into money, by a table of prices: the usual ones, or the user's."""

from __future__ import annotations

from benchmarks.speed.process import Measurement
from cloudckpt.report import Prices

__all__ = ["cost_of"]

# By how S3 and GCS charge for them; what is in neither (deletes, aborts) is free.
_WRITES = frozenset(
    {"PutObject", "CopyObject", "ListObjectsV2", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}
    | {"CreateBucket", "objects.insert", "objects.insert (begin)", "objects.list", "objects.rewrite", "objects.move"}
)
# The chunks of a resumable upload belong to the request that began it.
_FREE = frozenset({"DeleteObject", "DeleteObjects", "AbortMultipartUpload", "objects.delete", "objects.insert (chunk)"})


def cost_of(run: Measurement, prices: Prices) -> float | None:
    """Return what one save or load costs, in the currency of `prices`; None where its requests were not counted.

    Requests, and the bytes that the store sends out (free inside a region); not what the checkpoint costs as it lies.
    """
    if run.requests is None:
        return None
    writes = sum(count for name, count in run.requests.items() if name in _WRITES)
    reads = sum(count for name, count in run.requests.items() if name not in _WRITES | _FREE)
    return prices.cost(writes=writes, reads=reads, sent_bytes=run.sent_bytes or 0)
