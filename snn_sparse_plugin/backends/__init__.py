"""How a backend is chosen. What one is stands in :mod:`snn_sparse_plugin.core.backend`, and is found here as well."""

from __future__ import annotations

import logging

import torch

from ..core import registry
from ..core.backend import (
    CHUNK,
    Backend,
    InputGrads,
    LayerCall,
    LayerResult,
    Needs,
    OutputGrads,
    RunsTtfs,
    Saved,
    TtfsBackward,
    calls,
    check_finite,
    keeps_active,
)
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations
from ..core.errors import UnsupportedError
from ..core.surrogates import Surrogate

__all__ = [
    "CHUNK",
    "Backend",
    "InputGrads",
    "LayerCall",
    "LayerResult",
    "Needs",
    "OutputGrads",
    "RunsTtfs",
    "Saved",
    "TtfsBackward",
    "calls",
    "check_finite",
    "keeps_active",
    "select",
]

log = logging.getLogger("snn_sparse_plugin")

_logged: set[tuple[str, str]] = set()


def select(
    name: str,
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: NeuronSpec | Equations | None = None,
    surrogate: Surrogate | None = None,
    recurrent: bool = False,
    without: str = "",
) -> Backend:
    """The backend for a call: the named one, or the first by priority (``without`` one) that supports it.

    ``spec`` and ``surrogate`` are given for ``spiking_layer`` alone.

    Raises:
        UnsupportedError: the named backend is unknown, missing or cannot do this; the message says why.
    """
    what = {
        "device": device,
        "dtype": dtype,
        "spec": spec,
        "surrogate": surrogate,
        "recurrent": recurrent,
    }
    if name != "auto":
        backend: Backend = registry.load("backends", name)
        ok, reason = _verdict(backend, op, what)
        if not ok:
            raise UnsupportedError(f"backend {name!r} cannot run {op} on {device} in {dtype}: {reason}")
        return backend
    loaded = registry.load_all("backends").items()
    found = sorted((b for n, b in loaded if n != without), key=lambda b: -b.priority)
    reasons = []
    for backend in found:
        ok, reason = _verdict(backend, op, what)
        if ok:
            return backend
        reasons.append(f"{backend.name}: {reason}")
        if (backend.name, reason) not in _logged:
            _logged.add((backend.name, reason))
            log.info("backend %s passed over for %s: %s", backend.name, op, reason)
    raise UnsupportedError(f"no backend can run {op} on {device} in {dtype}: {'; '.join(reasons)}")


def _verdict(backend: Backend, op: str, what: dict) -> tuple[bool, str]:
    try:
        if not hasattr(backend, op):
            return False, f"has no op {op!r}"
        if isinstance(what["spec"], Equations) and not backend.equations:
            return False, "does not run neurons given by equations"
        # first what needs nothing imported: on a CPU it spares Triton
        ok, reason = backend.supports(op, **what)
        return backend.available() if ok else (ok, reason)
    except Exception as error:  # a third-party backend must not take the others down
        return False, f"its own check failed with {type(error).__name__}: {error}"
