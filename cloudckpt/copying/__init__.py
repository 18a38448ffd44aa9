"""Read whole checkpoints without a state: whether they are whole, what differs between two, and copies of them."""

from cloudckpt.copying.copier import Copied
from cloudckpt.copying.diffing import Change, Difference, diff
from cloudckpt.copying.lead import copy
from cloudckpt.copying.verifying import Damage, Verified, verify, verify_all

__all__ = ["Change", "Copied", "Damage", "Difference", "Verified", "copy", "diff", "verify", "verify_all"]
