"""From trained TTFS layers to the spiking network with the same spike times: :func:`to_snn`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.errors import InputError, UnsupportedError
from .builder import Builder
from .convert import is_neuron
from .network import TTFSNetwork
from .neuron import TTFS
from .training import hidden_layers, warn_of_drift

_LEAVES = (TTFS, nn.Linear, nn.Conv2d, _BatchNorm, nn.MaxPool2d, nn.AvgPool2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # also subclasses of torch's layers, which fx would look into
        return (
            isinstance(module, _LEAVES) or is_neuron(module) or super().is_leaf_module(module, qualified_name)
        )


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps the shape of every tensor, and every value that is none, such as ``x.size(0)``."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.shapes[n] = tuple(out.shape)
        else:
            self.values[n] = out
        return out


def to_snn(model: nn.Module, example: Tensor, *, exact_grid: bool = False) -> TTFSNetwork:
    """The spiking network that a trained TTFS model equals, spike for spike.

    Batch normalisation is folded into the weights; convolutions, linear layers, max and average pooling, flattening and
    dropout are mapped, as modules or as functions; the first layer must be a :class:`TTFSEncoder` and the last one is
    read as membrane. Works on sequential models and on any module that ``torch.fx`` can trace into a chain.

    Args:
        model: in eval mode.
        example: a batch (B, …) of intensities in [0, 1], for shapes.
        exact_grid: put weights and kernels on a binary grid, :meth:`TTFSNetwork.on_grid`.

    Raises:
        UnsupportedError: a layer that cannot be mapped, named, with the reason; weights in half precision.
        InputError: the model does not run on the example, or has weights that are not finite.

    Example:
        >>> from snn_sparse_plugin.layers.ttfs import TTFSEncoder
        >>> model = nn.Sequential(TTFSEncoder(), nn.Linear(6, 5), TTFS(), nn.Linear(5, 3)).eval()
        >>> net = to_snn(model, torch.rand(1, 6))
        >>> net.verify(torch.rand(100, 6), exact_grid=True).equal
        1.0
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UnsupportedError(
                f"{name}: batch normalisation in train mode depends on the batch and cannot be folded into weights: "
                "call model.eval()."
            )
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(
                f"{name} is {tensor.dtype}; spiking networks are float32 or float64: model.float()."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} has NaN or infinite values; the network cannot be mapped.")
    for name, layer in hidden_layers(model):
        if layer.drifted:
            warn_of_drift(name, layer)
    source = copy.deepcopy(model).eval()
    try:
        graph = fx.GraphModule(source, _Tracer().trace(source))
    except Exception as error:
        raise UnsupportedError(
            f"torch.fx cannot trace {type(model).__name__}: {str(error).splitlines()[0]}. "
            "Its forward must not depend on values."
        ) from error
    shapes = _Shapes(graph)
    try:
        with torch.no_grad():
            shapes.run(example)
    except Exception as error:
        raise InputError(
            f"the model does not run on the example {tuple(example.shape)}: {str(error).splitlines()[0]}"
        ) from error
    net = Builder(graph, shapes.shapes, shapes.values, source).build()
    return net.on_grid() if exact_grid else net
