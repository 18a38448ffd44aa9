"""Turn a checkpoint into files that other programs read, and such files into a checkpoint, tensor by tensor."""

from cloudckpt.convert.exporting import export
from cloudckpt.convert.importing import Source, import_
from cloudckpt.convert.opened import Exported, Kind

__all__ = ["Exported", "Kind", "Source", "export", "import_"]
