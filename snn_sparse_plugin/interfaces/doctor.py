"""What this installation can do, and a check that every backend computes what the reference does."""

from __future__ import annotations

import difflib
import os
import platform
import sys
from typing import Any

import torch
from torch import Tensor

from ..adapters import loaded_adapters, outside_tested
from ..backends import Backend
from ..core import registry
from ..core.contracts import named
from ..core.dynamics import NeuronParams, NeuronSpec
from ..core.errors import InputError, SparsePluginError, UnsupportedError
from ..core.surrogates import Surrogate
from ..core.version import VERSION, installed
from ..ops.spiking_layer import spiking_layer

REQUIRED = ("torch", "numpy", "numba", "rich", "typer")
OPTIONAL = {
    "snntorch": "the snnTorch face",
    "norse": "the Norse face",
    "triton": "GPU kernels",
    "torch-sparse": "its tensors, a second backend",
    "scikit-learn": "the digits: demo, data",
    "h5py": "SHD and SSC",
    "tonic": "fetches recordings",
    "torchvision": "fetches images",
    "matplotlib": "pictures",
    "pytorch-lightning": "its callback",
    "spikingjelly": "a peer in the benchmark",
}
TOLERANCE = 1e-5  # relative norm of the difference of float32 gradients; spikes must be equal


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends and their self-check, as plain data for JSON.

    Example:
        >>> diagnose()["ok"]
        True
    """
    backends = [_backend(name) for name in registry.plugins("backends")]
    return {
        "versions": {
            "snn-sparse-plugin": VERSION,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: installed(name) for name in REQUIRED},
        },
        "optional": {name: _optional(name, use) for name, use in OPTIONAL.items()},
        "devices": _devices(),
        "threads": {"cores": os.cpu_count(), "torch": torch.get_num_threads()},
        "caches": _caches(),
        "backends": backends,
        "ok": all(b["state"] in ("ok", "unavailable", "idle") for b in backends),
    }


def kernel_source(neuron: str) -> str:
    """The Triton kernels that run a neuron class on a GPU, as they are generated for its default options.

    Args:
        neuron: a class of an installed library, ``"Leaky"`` or ``"snntorch.Leaky"``.

    Raises:
        InputError: no such class, or one that is not fused.

    Example:
        >>> "def step(v, x, mem, threshold):" in kernel_source("snntorch.Leaky")
        True
    """
    from ..triton_kernels.scans import source_of

    known = {}
    for adapter in loaded_adapters():
        for name, example in adapter.examples().items():
            known[f"{adapter.name}.{name}"] = adapter, example
    found = [pair for name, pair in known.items() if neuron in (name, name.partition(".")[2])]
    if not found:
        close = difflib.get_close_matches(neuron, [*known, *(name.partition(".")[2] for name in known)], 3)
        meant = f"; did you mean {' or '.join(close)}?" if close else "."
        raise InputError(f"no neuron class {neuron!r} in the installed libraries{meant}")
    adapter, example = found[0]
    described = adapter.neuron(example.build())
    if isinstance(described, str):
        raise InputError(f"{neuron} has no kernel: {described}.")
    return "\n\n".join(source_of(described.spec, described.recurrent, way) for way in ("forward", "backward"))


def _optional(name: str, use: str) -> dict[str, Any]:
    """An optional library; ``tested`` is an adapter's range of versions, ``warning`` set outside of it."""
    adapter = registry.load_all("adapters").get(name)
    tested = None if adapter is None else adapter.tested
    warning = "" if adapter is None else outside_tested(adapter)
    return {"version": installed(name), "for": use, "tested": tested, "warning": warning}


def _caches() -> dict[str, dict[str, Any]]:
    """Where compiled kernels lie; ``folder`` None: nowhere, as no folder can be written."""
    from ..backends.cpu.jit import cache_folder
    from ..triton_kernels.sources import folder as sources

    found = {}
    for name, folder, pattern in (("cpu", cache_folder(), "*.nbc"), ("gpu", sources(), "*.py")):
        files = [] if folder is None else list(folder.glob(pattern))
        found[name] = {
            "folder": None if folder is None else str(folder),
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
        }
    return found


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"device": "cpu", "name": _cpu_name()}]
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(k)
            memory = properties.total_memory
            found.append({"device": f"cuda:{k}", "name": properties.name, "memory_bytes": memory})
    return found


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _backend(name: str) -> dict[str, Any]:
    """One backend: ok, failed, broken (cannot be loaded), unavailable (here), idle (no device it runs on)."""
    row: dict[str, Any] = {"name": name, "state": "ok", "reason": "", "priority": None, "checks": []}
    try:
        backend: Backend = registry.load("backends", name)
        row["priority"] = backend.priority
        usable, row["reason"] = backend.available()
    except UnsupportedError as error:
        return row | {"state": "broken", "reason": str(error)}
    if not usable:
        return row | {"state": "unavailable"}
    refusals = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        check = check_backend(name, torch.device(device))
        if check["state"] == "not supported":
            refusals.append(f"{device}: {check['reason']}")
        else:
            row["checks"].append(check)
    if any(check["state"] == "failed" for check in row["checks"]):
        row["state"] = "failed"
    elif not row["checks"]:
        row |= {"state": "idle", "reason": "; ".join(refusals)}
    return row


def check_backend(name: str, device: torch.device) -> dict[str, Any]:
    """Run a backend forward and backward against the reference, masked and exact.

    The weights lie on a binary grid, so every order of summation gives the same currents and the spikes
    must be equal; gradients may differ by rounding, a relative norm of 1e-5.
    """
    row: dict[str, Any] = {"device": device.type, "state": "ok", "reason": ""}
    backend: Backend = registry.load("backends", name)
    try:
        ok, why = backend.supports(
            "spiking_layer",
            device=device,
            dtype=torch.float32,
            spec=NeuronSpec(),
            surrogate=Surrogate("fast_sigmoid", (25.0,)),
        )
        if not ok:
            return row | {"state": "not supported", "reason": why}
        differing, worst = 0, 0.0
        for threshold in (0.25, None):
            expected = _solve("reference", device, threshold)
            got = _solve(name, device, threshold)
            differing += int((expected[0] != got[0]).sum())
            worst = max(worst, *(_distance(a, b) for a, b in zip(expected[1:], got[1:], strict=True)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the backend does, the other rows are worth showing
        reason = str(error) if isinstance(error, SparsePluginError) else named(error)
        return row | {"state": "failed", "reason": reason}
    row |= {"differing_spikes": differing, "gradient_error": worst, "tolerance": TOLERANCE}
    if differing or not worst <= TOLERANCE:
        row |= {"state": "failed", "reason": f"{differing} spikes differ, gradients by {worst:.1e}"}
    return row


def _solve(backend: str, device: torch.device, threshold: float | None) -> tuple[Tensor, ...]:
    """Spikes, then the gradients of two stacked layers' weights and of a bias, for seeded inputs."""
    generator = torch.Generator().manual_seed(0)

    def grid(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale * 256).round() / 256

    T, B, M, N = 40, 3, 50, 33
    x = (torch.rand(T, B, M, generator=generator) < 0.1).float().to(device)
    w1, w2, bias = grid(N, M, scale=0.4), grid(N, N, scale=0.4), grid(N, scale=0.1)
    w1, w2, bias = (w.to(device).requires_grad_() for w in (w1, w2, bias))
    upstream = torch.randn(T, B, N, generator=generator).to(device)
    shared: dict[str, Any] = {
        "params": NeuronParams(mem=0.875),
        "surrogate": Surrogate("fast_sigmoid", (25.0,)),
        "backend": backend,
        "backprop_threshold": threshold,
    }
    hidden = spiking_layer(x, w1, bias, events=True, **shared).spikes
    spikes = spiking_layer(hidden, w2, **shared).spikes
    grads = torch.autograd.grad((spikes * upstream).sum(), (w1, w2, bias))
    return (torch.cat([hidden.detach().to_dense(), spikes.detach()]), *grads)


def _distance(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).norm() / expected.norm().clamp_min(1e-30))
