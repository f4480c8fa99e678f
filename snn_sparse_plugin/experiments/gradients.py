"""The sparse gradient against the dense one, weight matrix by weight matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import MissingDependencyError
from ..core.spikes import SpikeTrain
from .losses import loss
from .network import Network
from .upstream import StepLoop


def weight_gradients(net: Network, x: SpikeTrain, y: Tensor, *, sparse: bool) -> list[Tensor]:
    """Gradients of the whole loss to every weight matrix, input side first."""
    out = net(x, sparse=sparse)
    _, total = loss(out.mem, y, [s.counts() for s in out.spikes], net.settings)
    return list(torch.autograd.grad(total, _weights(net)))


def upstream_gradients(net: Network, x: SpikeTrain, y: Tensor) -> list[Tensor]:
    """The same from snnTorch's step loop under autograd."""
    out = StepLoop(net)(x.to_dense())
    _, total = loss(out.mem, y, out.counts, net.settings)
    return list(torch.autograd.grad(total, _weights(net)))


def compare(net: Network, x: SpikeTrain, y: Tensor) -> list[dict[str, Any]]:
    """One row for each weight matrix: how far the sparse gradient is from the dense one.

    ``relative_error``: the norm of the difference over that of the dense gradient; ``cosine``: of the angle between
    them, and ``norm_ratio``: sparse over dense, both None where the dense gradient is zero; ``exact_error``: the
    relative error of this package's exact mode against snnTorch's loop, None without snnTorch.
    """
    sparse = weight_gradients(net, x, y, sparse=True)
    dense = weight_gradients(net, x, y, sparse=False)
    try:
        upstream: list[Tensor] | None = upstream_gradients(net, x, y)
    except MissingDependencyError:
        upstream = None
    rows = []
    for k, (a, b) in enumerate(zip(sparse, dense, strict=True)):
        passes = bool(b.any())  # behind a silent layer there is nothing to compare
        rows.append(
            {
                "weights": _name(k, len(dense)),
                "relative_error": _relative(a, b),
                "cosine": float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) if passes else None,
                "norm_ratio": float(a.norm() / b.norm()) if passes else None,
                "exact_error": None if upstream is None else _relative(b, upstream[k]),
            }
        )
    return rows


def _name(k: int, count: int) -> str:
    if k == 0:
        return "input → hidden 1"
    return f"hidden {k} → " + ("readout" if k == count - 1 else f"hidden {k + 1}")


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))


def _weights(net: Network) -> list[Tensor]:
    return [*(linear.weight for linear in net.hidden), net.readout.weight]  # type: ignore[list-item]
