"""Serve the store's verbs by obstore, the fast engine: S3 by default, GCS (its XML API) for whoever asks for it.

It takes fsspec's storage options, with fsspec's meaning, or refuses them. obstore maps both 409 and 412 of a create
to "already exists"; they are told apart by the status. In a process forked from one that used obstore, where it
would hang, fsspec's wire does the work.
"""

from __future__ import annotations

import logging
from functools import partial

from cloudckpt.errors import OptionsError
from cloudckpt.store.fsspec import fsspec_wire
from cloudckpt.store.terms import refuse_terms
from cloudckpt.store.wire import Wire
from cloudckpt.store.wired import WiredStore

__all__ = ["ObstoreStore"]

logger = logging.getLogger(__name__)


class ObstoreStore(WiredStore):
    """Objects below one root URL, moved by obstore. See `Store` for the verbs."""

    engine = "obstore"
    is_create_atomic = True

    def _check_options(self) -> None:
        if self._location.scheme == "s3":
            from cloudckpt.store.obstore_s3 import S3Options

            S3Options.read(self._options, signed_payload=self._terms.signed_payload)
            refuse_terms(self._terms, "obstore", checksums=("crc64nvme", "sha256"), creates=True)
        elif self._location.scheme == "gs":
            from cloudckpt.store.obstore_gcs import check_gcs_options

            check_gcs_options(self._options)
            refuse_terms(self._terms, "obstore to gs://", creates=True)
        else:
            raise OptionsError(f'obstore serves s3:// and gs://, not {self._location.scheme}://; pass engine="fsspec"')

    def _connect(self) -> Wire:
        from cloudckpt.store.wire_obstore import ObstoreWire, is_lost_to_a_fork

        # Not a method of this store: a wire that holds its store could not be freed before the next garbage collection.
        by_fsspec = partial(fsspec_wire, self._location, self._options, retry=self._retry, terms=self._terms)
        if is_lost_to_a_fork():
            logger.warning("obstore does not survive a fork: fsspec serves %s in this process", self.url)
            return by_fsspec()
        bucket = self._location.bucket
        if self._location.scheme == "s3":
            from cloudckpt.store.obstore_s3 import S3Options, s3_client

            options = S3Options.read(self._options, signed_payload=self._terms.signed_payload)
            client = s3_client(bucket, options, self._retry, checksum=self._terms.checksum)
        else:
            from cloudckpt.store.obstore_gcs import gcs_client

            client = gcs_client(bucket, self._options, self._retry)
        return ObstoreWire(client, by_fsspec, create_only=self._terms.create_only)
