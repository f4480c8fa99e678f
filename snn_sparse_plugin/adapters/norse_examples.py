"""How to build every neuron class of Norse: the rows of the table of supported neurons."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from .base import Example

_NAMES = (
    *("LIF", "LIFCell", "LIFRecurrent", "LIFRecurrentCell", "LIFBoxCell", "IAF", "IAFCell"),
    *("LIFEx", "LIFExCell", "LIFExRecurrent", "LIFExRecurrentCell"),
    *("LIFAdEx", "LIFAdExCell", "LIFAdExRecurrent", "LIFAdExRecurrentCell"),
    *("LIFRefracCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"),
    *("LIFAdExRefracCell", "LIFAdExRefracRecurrent", "LIFAdExRefracRecurrentCell"),
    *("LSNN", "LSNNCell", "LSNNRecurrent", "LSNNRecurrentCell"),
    *("Izhikevich", "IzhikevichCell", "IzhikevichRecurrent", "IzhikevichRecurrentCell"),
    *("LI", "LICell", "LILinearCell", "LIBoxCell"),
    *("LIFMCRecurrentCell", "LIFMCRefracRecurrentCell", "CobaLIFCell", "LIFCorrelation"),
)


def examples() -> dict[str, Example]:
    """See :meth:`Adapter.examples`."""
    norse = import_module("norse.torch")
    found = {}
    for name in _NAMES:
        cls = getattr(norse, name)
        sizes = (
            (4, 4) if "Recurrent" in name or name in ("LILinearCell", "CobaLIFCell", "LIFCorrelation") else ()
        )
        behaviour = (norse.tonic_spiking,) if name.startswith("Izhikevich") else ()
        takes_all = issubclass(cls, import_module("norse.torch.module.snn").SNN)
        options = {"record_states": True} if takes_all else {}
        exactness = "up to the last bit of exp()" if "Ex" in name else ""
        found[name] = Example(partial(cls, *sizes, *behaviour), options, exactness)
    return found
