"""Norse, sparse: ``import snn_sparse_plugin.norse as norse`` instead of ``import norse.torch as norse``.

Every name of ``norse.torch`` is here; the LIF, LIFBox, IAF and LI families and ``SequentialState`` are
subclasses of the originals that are always sparse, with the options of the enclosing ``sparse_mode``, or the
defaults. Other neurons are sparse inside ``sparse_mode`` only, as the originals are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .adapters.faces import as_upstream, import_upstream, passthrough, sparse_class

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
    "to_nir",
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
    globals().update(
        (_name, sparse_class(getattr(_upstream, _name), __name__)) for _name in __all__ if _name != "to_nir"
    )


def to_nir(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Norse's ``to_nir``, whose table of classes knows only Norse's own."""
    with as_upstream(module):
        return _upstream.to_nir(module, *args, **kwargs)


__path__: list[str] = []  # lets `import snn_sparse_plugin.norse.functional` find Norse's own
__getattr__, __dir__ = passthrough(__name__, _upstream)
