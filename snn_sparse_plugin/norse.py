"""Norse, sparse: ``import snn_sparse_plugin.norse as norse`` instead of ``import norse.torch as norse``.

Every name of ``norse.torch`` is here; the LIF, LIFBox, IAF and LI families and ``SequentialState`` are
subclasses of the originals that are always sparse, with the options of the enclosing ``sparse_mode``, or the
defaults. Other neurons are sparse inside ``sparse_mode`` only, as the originals are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapters.faces import import_upstream, passthrough, sparse_class

_upstream = import_upstream("norse.torch", "norse")

__all__ = [
    "IAF",
    "LI",
    "LIF",
    "IAFCell",
    "LICell",
    "LIFBoxCell",
    "LIFCell",
    "LIFRecurrent",
    "LIFRecurrentCell",
    "LILinearCell",
    "SequentialState",
]

if TYPE_CHECKING:
    from norse.torch import (
        IAF,
        LI,
        LIF,
        IAFCell,
        LICell,
        LIFBoxCell,
        LIFCell,
        LIFRecurrent,
        LIFRecurrentCell,
        LILinearCell,
        SequentialState,
    )
else:
    globals().update((_name, sparse_class(getattr(_upstream, _name), __name__)) for _name in __all__)

__path__: list[str] = []  # lets `import snn_sparse_plugin.norse.functional` find Norse's own
__getattr__, __dir__ = passthrough(__name__, _upstream)
