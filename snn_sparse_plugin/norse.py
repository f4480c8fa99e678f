"""Norse, sparse: ``import snn_sparse_plugin.norse as norse`` instead of ``import norse.torch as norse``.

Every name of ``norse.torch`` is here; its neurons and ``SequentialState`` are subclasses of the originals that are
always sparse, with the options of the enclosing ``sparse_mode``, or the defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .adapters.faces import as_upstream, import_upstream, passthrough, sparse_classes

_upstream = import_upstream("norse.torch", "norse")

__all__ = [
    "IAF",
    "LI",
    "LIF",
    "LSNN",
    "CobaLIFCell",
    "IAFCell",
    "Izhikevich",
    "IzhikevichCell",
    "IzhikevichRecurrent",
    "IzhikevichRecurrentCell",
    "LIBoxCell",
    "LICell",
    "LIFAdEx",
    "LIFAdExCell",
    "LIFAdExRecurrent",
    "LIFAdExRecurrentCell",
    "LIFAdExRefracCell",
    "LIFAdExRefracRecurrent",
    "LIFAdExRefracRecurrentCell",
    "LIFBoxCell",
    "LIFCell",
    "LIFCorrelation",
    "LIFEx",
    "LIFExCell",
    "LIFExRecurrent",
    "LIFExRecurrentCell",
    "LIFMCRecurrentCell",
    "LIFMCRefracRecurrentCell",
    "LIFRecurrent",
    "LIFRecurrentCell",
    "LIFRefracCell",
    "LIFRefracRecurrent",
    "LIFRefracRecurrentCell",
    "LILinearCell",
    "LSNNCell",
    "LSNNRecurrent",
    "LSNNRecurrentCell",
    "SequentialState",
    "to_nir",
]

if TYPE_CHECKING:
    from norse.torch import (
        IAF,
        LI,
        LIF,
        LSNN,
        CobaLIFCell,
        IAFCell,
        Izhikevich,
        IzhikevichCell,
        IzhikevichRecurrent,
        IzhikevichRecurrentCell,
        LIBoxCell,
        LICell,
        LIFAdEx,
        LIFAdExCell,
        LIFAdExRecurrent,
        LIFAdExRecurrentCell,
        LIFAdExRefracCell,
        LIFAdExRefracRecurrent,
        LIFAdExRefracRecurrentCell,
        LIFBoxCell,
        LIFCell,
        LIFCorrelation,
        LIFEx,
        LIFExCell,
        LIFExRecurrent,
        LIFExRecurrentCell,
        LIFMCRecurrentCell,
        LIFMCRefracRecurrentCell,
        LIFRecurrent,
        LIFRecurrentCell,
        LIFRefracCell,
        LIFRefracRecurrent,
        LIFRefracRecurrentCell,
        LILinearCell,
        LSNNCell,
        LSNNRecurrent,
        LSNNRecurrentCell,
        SequentialState,
    )
else:
    # other versions of Norse lack some of them
    _found = [getattr(_upstream, name) for name in __all__ if name != "to_nir" and hasattr(_upstream, name)]
    for _class in sparse_classes(_found, __name__):
        globals()[_class.__name__] = _class


def to_nir(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Norse's ``to_nir``, whose table of classes knows only Norse's own."""
    with as_upstream(module):
        return _upstream.to_nir(module, *args, **kwargs)


__path__: list[str] = []  # lets `import snn_sparse_plugin.norse.functional` find Norse's own
__getattr__, __dir__ = passthrough(__name__, _upstream)
