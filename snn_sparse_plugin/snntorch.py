"""snnTorch, sparse: ``import snn_sparse_plugin.snntorch as snn`` instead of ``import snntorch as snn``.

Every name of snnTorch is here; Leaky, Synaptic, RLeaky and RSynaptic are subclasses of the originals that are
always sparse, with the options of the enclosing ``sparse_mode``, or the defaults. Other neurons are sparse
inside ``sparse_mode`` only, as the originals are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapters.faces import import_upstream, passthrough, sparse_class
from .adapters.snntorch import picklable_state, restored_state

_upstream = import_upstream("snntorch", "snntorch")

if TYPE_CHECKING:
    from snntorch import Leaky, RLeaky, RSynaptic, Synaptic
else:
    for _name in ("Leaky", "Synaptic", "RLeaky", "RSynaptic"):
        _class = sparse_class(getattr(_upstream, _name), __name__)
        _class.__getstate__, _class.__setstate__ = picklable_state, restored_state
        globals()[_name] = _class
    del _name, _class

__all__ = ["Leaky", "RLeaky", "RSynaptic", "Synaptic"]
__path__: list[str] = []  # lets `import snn_sparse_plugin.snntorch.functional` find snnTorch's own
__version__: Any = getattr(_upstream, "__version__", None)
__getattr__, __dir__ = passthrough(__name__, _upstream)
