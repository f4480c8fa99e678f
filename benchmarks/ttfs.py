"""Time-to-first-spike layers: the activation against ReLU + fake-quantise, and the two simulators.

python benchmarks/ttfs.py [--elements 10000000] [--rounds 15] [--threads 2] [--json FILE]

Every provider runs in turn in every round; medians with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from snn_sparse_plugin.bench.measure import Spread, saved_bytes
from snn_sparse_plugin.layers.ttfs import TTFS, TTFSEncoder, TTFSNetwork, to_snn

warnings.filterwarnings("ignore", category=DeprecationWarning)


def fake_quantised() -> nn.Module:
    """ReLU, then torch's fake quantisation to 32 levels, with its range fixed as in training after calibration."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    quantise = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=31)
    quantise(torch.rand(1000))
    quantise.disable_observer()
    return nn.Sequential(nn.ReLU(), quantise)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "TTFS": lambda: TTFS(t_d=0.5),
    "TTFS, fixed kernel": lambda: TTFS(t_d=0.5, train_kernel=False),
    "ReLU + fake-quantise": fake_quantised,
    "ReLU": nn.ReLU,
}


def activations(elements: int, rounds: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of one activation of standard normal pre-activations."""
    x = torch.randn(elements, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(elements, device=device, dtype=dtype)
    modules = {name: make().to(device) for name, make in ACTIVATIONS.items()}

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return perf_counter()

    def step(module: nn.Module) -> float:
        x.grad = None
        begin = now()
        module(x).backward(g)
        return now() - begin

    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for k in range(rounds + 2):
        for name, module in modules.items():
            took = step(module)
            if k >= 2:
                seconds[name].append(took)
    rows = []
    for name, module in modules.items():
        kept, _ = saved_bytes(lambda module=module: module(x), kept=[x])
        row = {
            "op": "activation",
            "provider": name,
            "elements": elements,
            "saved_bytes_per_element": kept / elements,
        }
        rows.append(row | Spread.of(seconds[name])._asdict())
    return rows


def layers(density: float) -> dict[str, tuple[TTFSNetwork, Tensor]]:
    """One layer each, with inputs of which a share of ``density`` fires."""
    dense = nn.Sequential(TTFSEncoder(), nn.Linear(1024, 1024), TTFS()).eval()
    conv = nn.Sequential(TTFSEncoder(), nn.Conv2d(32, 64, 3, padding=1), TTFS()).eval()
    found = {}
    for name, model, shape in (
        ("linear 1024-1024", dense, (1024,)),
        ("conv 32-64 3×3 on 16×16", conv, (32, 16, 16)),
    ):
        x = torch.rand(64, *shape).clamp(min=0.05) * (torch.rand(64, *shape) < density)
        found[name] = (to_snn(model, x[:1]), x)
    return found


def simulators(densities: list[float], rounds: int) -> list[dict[str, Any]]:
    """Event by event against step by step, one layer, 64 samples."""
    rows = []
    for density in densities:
        for name, (net, x) in layers(density).items():
            seconds: dict[str, list[float]] = {"event": [], "clock": []}
            for k in range(rounds + 1):
                for simulator, found in seconds.items():
                    begin = perf_counter()
                    net.run(x, simulator=simulator)
                    if k:
                        found.append(perf_counter() - begin)
            for simulator, found in seconds.items():
                row = {"op": "simulation", "provider": simulator, "layer": name, "density": density}
                rows.append(row | Spread.of(found)._asdict())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--density", type=float, nargs="+", default=[0.02, 0.1, 0.3, 1.0])
    parser.add_argument("--device", default="cpu", help="cuda: the activation alone")
    parser.add_argument("--dtype", default="float32", help="of the activation's input")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    about = {
        "threads": args.threads,
        "device": platform.processor() or platform.machine(),
        "dtype": "float32",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
    rows = activations(args.elements, args.rounds, args.device, getattr(torch, args.dtype))
    if args.device == "cpu":
        rows += simulators(args.density, max(3, args.rounds // 3))
    for row in rows:
        what = row.get("layer", f"{row.get('elements')} elements")
        density = f" {100 * row['density']:g} %" if "density" in row else ""
        print(
            f"{row['provider']:<22} {what}{density}: {row['median']:.2f} ms ({row['p20']:.2f}…{row['p80']:.2f})"
        )
    if args.json:
        args.json.write_text(json.dumps([row | about for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
