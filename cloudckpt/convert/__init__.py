"""Turn a checkpoint into files that other programs read, and such files into a checkpoint, tensor by tensor."""

from cloudckpt.convert.exporting import export
from cloudckpt.convert.hf import CloudHFReader, CloudHFWriter
from cloudckpt.convert.importing import Source, import_
from cloudckpt.convert.opened import Exported, Kind
from cloudckpt.convert.places import refuse_ours
from cloudckpt.convert.plain import open_file as open  # noqa: A004 (as gzip has it)

__all__ = ["CloudHFReader", "CloudHFWriter", "Exported", "Kind", "Source", "export", "import_", "open", "refuse_ours"]
