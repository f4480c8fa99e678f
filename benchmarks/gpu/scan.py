"""The neurons of a layer alone, on a given current: bytes per second, against a copy on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from snn_sparse_plugin.core.dynamics import NeuronParams
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.ops.spiking_layer import spiking_layer

from .clock import Run, queued
from .compare import Row, why


def scan(run: Run, n: int) -> Iterator[Row]:
    """Rows of the copy, the forward and the backward of ``n`` neurons.

    Counted are the bytes that have to move, in float32: the current in and the spikes out; and for the backward the
    current and the spikes' gradient in and the current's gradient out. State and checkpoints come on top.
    """
    T, B = run.sizes.scan
    size = 4 * T * B * n
    head = {
        "row": f"neuron scan, N={n}, T={T}, B={B}",
        "shape": {"T": T, "B": B, "N": n},
        "figures": ["share"],
        "ops": ["layer"],
    }
    if run.on_gpu and 8 * size > torch.cuda.mem_get_info()[0]:
        yield head | {"provider": "forward", "role": "ours", "failed": f"{8 * size} bytes do not fit"}
        return
    current = (0.3 * torch.randn(T, B, n, device=run.device)).requires_grad_()
    target, grad = torch.empty_like(current), torch.randn_like(current)
    options: dict[str, Any] = {
        "params": NeuronParams(mem=0.9),
        "surrogate": Surrogate("fast_sigmoid", (100.0,)),
        "backprop_threshold": 0.2,
        "min_active": 0,
    }

    @torch.no_grad()
    def copy() -> None:
        target.copy_(current)

    @torch.no_grad()
    def forward() -> None:
        spiking_layer(current, **options)

    spikes = spiking_layer(current, **options).spikes

    def backward() -> None:
        torch.autograd.grad(spikes, current, grad, retain_graph=True)

    rate = float(spikes.detach().mean())
    works: dict[str, tuple[Callable[[], None], int]] = {
        "copy": (copy, 2 * size),
        "forward": (forward, 2 * size),
        "backward": (backward, 3 * size),
    }
    copied = None
    for provider, (work, moved) in works.items():
        about = head | {"provider": provider, "role": "also" if provider == "copy" else "ours"}
        if run.warming:
            work()
            run.sync()
            continue
        run.hurry()
        try:
            spread = queued(run, work)
        except Exception as error:
            yield about | why(error)
            run.still_there()
            continue
        per_second = moved / (spread.median * 1e-3)
        copied = copied or per_second
        yield about | {
            "queued_ms": spread._asdict(),
            "bytes": moved,
            "gigabytes_per_second": per_second / 1e9,
            "share_of_copy": per_second / copied,
            "spike_rate": rate,
        }
