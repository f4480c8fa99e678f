"""snnTorch, sparse: ``import snn_sparse_plugin.snntorch as snn`` instead of ``import snntorch as snn``.

Every name of snnTorch is here; its thresholded neurons are subclasses of the originals that are always sparse,
with the options of the enclosing ``sparse_mode``, or the defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapters.faces import import_upstream, passthrough, sparse_classes
from .adapters.snntorch_surrogates import picklable_state, restored_state

_upstream = import_upstream("snntorch", "snntorch")

__all__ = [
    "SLSTM",
    "Alpha",
    "AssociativeLeaky",
    "DeltaLeaky",
    "Lapicque",
    "Leaky",
    "LeakyParallel",
    "LinearLeaky",
    "RLeaky",
    "RSynaptic",
    "SConv2dLSTM",
    "StateLeaky",
    "Synaptic",
]

if TYPE_CHECKING:
    from snntorch import (
        SLSTM,
        Alpha,
        AssociativeLeaky,
        DeltaLeaky,
        Lapicque,
        Leaky,
        LeakyParallel,
        LinearLeaky,
        RLeaky,
        RSynaptic,
        SConv2dLSTM,
        StateLeaky,
        Synaptic,
    )
else:
    # older versions of snnTorch lack some of them
    _found = [getattr(_upstream, name) for name in __all__ if hasattr(_upstream, name)]
    for _class in sparse_classes(_found, __name__):
        _class.__getstate__, _class.__setstate__ = picklable_state, restored_state
        globals()[_class.__name__] = _class
    __all__ = [name for name in __all__ if name in globals()]
    del _class, _found

__path__: list[str] = []  # lets `import snn_sparse_plugin.snntorch.functional` find snnTorch's own
__version__: Any = getattr(_upstream, "__version__", None)
__getattr__, __dir__ = passthrough(__name__, _upstream)
