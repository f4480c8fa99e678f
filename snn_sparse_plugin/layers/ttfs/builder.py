"""The rules by which layers become stages of the spiking network: normalisation folded, pooling moved to spikes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.errors import UnsupportedError
from .convert import is_neuron
from .network import TTFSNetwork
from .neuron import TTFS
from .stages import Pair, Pool, Stage

_PASS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _AlwaysDropout(nn.Module):
    """``F.dropout(x)`` without ``training=self.training``: random in eval mode too."""


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    return _AlwaysDropout() if training and p else nn.Identity()


# functions with the module that they are, and their arguments behind the input in order
_POOLING = ("kernel_size", "stride", "padding")
_MODULES: dict[Any, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    F.max_pool2d: (nn.MaxPool2d, (*_POOLING, "dilation", "ceil_mode", "return_indices")),
    torch.max_pool2d: (nn.MaxPool2d, (*_POOLING, "dilation", "ceil_mode")),
    F.avg_pool2d: (nn.AvgPool2d, (*_POOLING, "ceil_mode", "count_include_pad", "divisor_override")),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), (lambda **_: nn.ReLU(), ())),
    **dict.fromkeys((F.dropout, F.dropout2d), (_dropout, ("p", "training", "inplace"))),
    "contiguous": (lambda **_: nn.Identity(), ()),
}
_RESHAPES: tuple[Any, ...] = (
    *(torch.flatten, torch.reshape, torch.unflatten, torch.squeeze, torch.unsqueeze),
    *("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"),
)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", torch.cat)


class Builder:
    """Walks the chain of nodes and collects stages.

    Args:
        graph: the traced model.
        shapes: of every tensor in it.
        values: everything else that the graph computes.
        source: the model, for :meth:`TTFSNetwork.verify`.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        shapes: dict[fx.Node, tuple[int, ...]],
        values: dict[fx.Node, Any],
        source: nn.Module,
    ) -> None:
        self.modules = dict(graph.named_modules())
        self.graph, self.shapes, self.values, self.source = graph, shapes, values, source
        self.encoder: TTFS | None = None
        self.stages: list[Stage] = []
        self.before: list[Pool] = []
        self.pending: Stage | None = None  # synapses that wait for their neurons
        self.synapses = ""
        self.in_shape: tuple[int, ...] = ()

    def refuse(self, node: fx.Node, why: str) -> UnsupportedError:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        what = (
            type(module).__name__
            if module is not None
            else getattr(node.target, "__name__", str(node.target))
        )
        name = str(node.target) if module is not None else node.name
        return UnsupportedError(f"to_snn cannot map {name} ({what}): {why}")

    def build(self) -> TTFSNetwork:
        nodes = list(self.graph.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise UnsupportedError(f"to_snn maps models of one input, this one has {len(inputs)}.")
        shape = self.shapes[inputs[0]][1:]
        for node in nodes:
            if node.op == "output" or node not in self.shapes:  # a number such as x.size(0)
                continue
            users = [n for n in node.users if n in self.shapes]
            if len(users) > 1:
                names = ", ".join(n.name for n in users)
                raise self.refuse(
                    node, f"its output goes to {names}; residual and parallel paths are not mapped."
                )
            if node.op == "get_attr":
                raise self.refuse(node, "a tensor used outside a layer.")
            if node.op != "placeholder":
                self.step(node, self.module(node))
        if self.pending is not None:
            self.stages.append(replace(self.pending, name=self.unique(self.synapses)))
        elif self.before:
            raise UnsupportedError(
                "to_snn: the model ends in a pooling of spikes; end it with a layer that reads them."
            )
        if self.encoder is None or not self.stages:
            raise UnsupportedError(
                "to_snn: the model has no synapses (nn.Linear, nn.Conv2d) behind a TTFSEncoder."
            )
        dtype = self.stages[0].weight.dtype
        table = self.encoder.table(dtype).detach()
        return TTFSNetwork(table, self.stages, shape, self.source)

    def unique(self, name: str) -> str:
        """The layer's name; a layer used at several places has a number at all but the first."""
        uses = 1 + sum(s.name.split("#")[0] == name for s in self.stages)
        return name if uses == 1 else f"{name}#{uses}"

    def module(self, node: fx.Node) -> nn.Module:
        """The module of a node, or the one that its function is."""
        if node.op == "call_module":
            return self.modules[str(node.target)]
        if node.target in _SUMS:
            raise self.refuse(node, "residual and parallel paths are not mapped.")
        if node.target in _RESHAPES:
            return nn.Flatten()
        if node.target not in _MODULES:
            raise self.refuse(
                node, "there is no rule for this function; layers with weights have to be modules."
            )
        make, names = _MODULES[node.target]
        positional, named = fx.map_arg((node.args, node.kwargs), self.values.get)
        options = dict(zip(names, positional[1:], strict=False)) | {k: named[k] for k in names if k in named}
        return make(**options)

    def step(self, node: fx.Node, module: nn.Module) -> None:
        shape = self.shapes[node][1:]
        if isinstance(module, TTFS):
            self.neurons(node, module, shape)
        elif isinstance(module, nn.Flatten | nn.Unflatten):
            self.reshape(node)
        elif isinstance(module, _PASS):
            return
        elif self.encoder is None:
            raise self.refuse(node, "the input arrives as numbers, not as spikes: put a TTFSEncoder first.")
        elif isinstance(module, nn.Linear | nn.Conv2d):
            self.connect(node, module, shape)
        elif isinstance(module, _BatchNorm):
            self.fold(node, module)
        elif isinstance(module, nn.MaxPool2d | nn.AdaptiveMaxPool2d):
            self.max_pool(node, module)
        elif isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            self.average_pool(node, module)
        else:
            raise self.refuse(node, _hint(module))

    def neurons(self, node: fx.Node, module: TTFS, shape: tuple[int, ...]) -> None:
        if self.encoder is None:
            self.encoder, self.in_shape = module, shape
            return
        if self.pending is None:
            raise self.refuse(node, "there are no synapses between it and the spikes before it.")
        stage = self.pending
        table = module.table(stage.weight.dtype).detach()
        self.stages.append(replace(stage, name=self.unique(str(node.target)), table=table))
        self.pending, self.in_shape = None, shape

    def connect(self, node: fx.Node, module: nn.Module, shape: tuple[int, ...]) -> None:
        if self.pending is not None:
            raise self.refuse(node, f"there is no TTFS layer between it and {self.synapses}.")
        stage = Stage(
            name=str(node.target),
            weight=module.weight.detach().clone(),  # type: ignore[union-attr, operator]
            bias=None if module.bias is None else module.bias.detach().clone(),  # type: ignore[union-attr, operator]
            in_shape=self.in_shape,
            out_shape=shape,
            table=None,
            before=self.before,
        )
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise self.refuse(node, f"padding_mode={module.padding_mode!r}; only zeros are silence.")
            padding: Any = module.padding
            if isinstance(padding, str):
                reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
                if padding == "same" and any(r % 2 for r in reach):
                    raise self.refuse(node, "padding='same' with an even kernel pads one side more.")
                padding = tuple(r // 2 for r in reach) if padding == "same" else (0, 0)
            stage = replace(
                stage,
                stride=_pair(module.stride),
                padding=_pair(padding),
                dilation=_pair(module.dilation),
                groups=module.groups,
            )
        elif len(shape) != 1:
            raise self.refuse(
                node, f"a linear layer of {shape} acts on part of the dimensions: flatten to (B, N) first."
            )
        self.pending, self.synapses, self.before = stage, str(node.target), []

    def fold(self, node: fx.Node, module: _BatchNorm) -> None:
        stage = self.pending
        if stage is None or stage.after or stage.flatten_after:
            raise self.refuse(
                node, "batch normalisation is folded into the linear or convolution right before it."
            )
        assert module.running_mean is not None
        assert module.running_var is not None
        scale = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.detach().double()
        shift = (
            -module.running_mean.double()
            if stage.bias is None
            else stage.bias.double() - module.running_mean.double()
        )
        bias = shift * scale
        if module.bias is not None:
            bias = bias + module.bias.detach().double()
        weight = stage.weight.double() * scale.view(-1, *(1 for _ in stage.weight.shape[1:]))
        self.pending = replace(stage, weight=weight.to(stage.weight.dtype), bias=bias.to(stage.weight.dtype))

    def reshape(self, node: fx.Node) -> None:
        before, after = self.shapes[_argument(node)], self.shapes[node]
        if before[0] != after[0] or len(after) < 2 or math.prod(before) != math.prod(after):
            raise self.refuse(node, f"{before} to {after} does not keep the batch dimension.")
        if len(after) == 2:
            if self.pending is not None:
                self.pending = replace(self.pending, flatten_after=True)
        elif self.pending is not None or self.before:
            raise self.refuse(node, "put it right behind a TTFS layer.")
        else:
            self.in_shape = after[1:]

    def max_pool(self, node: fx.Node, module: nn.MaxPool2d | nn.AdaptiveMaxPool2d) -> None:
        if module.return_indices:
            raise self.refuse(node, "return_indices=True.")
        if isinstance(module, nn.AdaptiveMaxPool2d):
            pool = Pool("max", *2 * (self.fixed(node),))
        else:
            kernel, stride, padding, dilation = (
                _pair(size) for size in (module.kernel_size, module.stride, module.padding, module.dilation)
            )
            pool = Pool("max", kernel, stride, padding, dilation, module.ceil_mode)
        if self.pending is not None:  # the largest membrane fires first, so pooling can wait for the spikes
            self.pending = replace(self.pending, after=[*self.pending.after, pool])
        elif any(p.kind == "avg" for p in self.before):
            raise self.refuse(node, "what an average pooling passes is not a spike that can be the earliest.")
        else:
            self.before.append(pool)

    def average_pool(self, node: fx.Node, module: nn.AvgPool2d | nn.AdaptiveAvgPool2d) -> None:
        if self.pending is not None:
            raise self.refuse(node, "it averages membranes: put it behind the TTFS layer.")
        if isinstance(module, nn.AdaptiveAvgPool2d):
            kernel, plain = self.fixed(node), True
        else:
            kernel = _pair(module.kernel_size)
            plain = kernel == _pair(module.stride) and _pair(module.padding) == (0, 0)
            plain = plain and not module.ceil_mode and module.divisor_override is None
        if not plain or any(p.kind == "avg" for p in self.before):
            raise self.refuse(
                node, "only one average pooling of windows side by side, without padding, is mapped."
            )
        self.before.append(Pool("avg", kernel, kernel))

    def fixed(self, node: fx.Node) -> Pair:
        """The window of an adaptive pooling at the size it has here."""
        (h, w), (oh, ow) = self.shapes[_argument(node)][-2:], self.shapes[node][-2:]
        if h % oh or w % ow:
            raise self.refuse(node, f"its windows are of several sizes, {h}×{w} to {oh}×{ow}.")
        return h // oh, w // ow


def _argument(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _hint(module: nn.Module) -> str:
    if isinstance(module, nn.ReLU) or is_neuron(module):
        return "it has no spike times of this coding: convert the model with to_ttfs and train it."
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        return "the readout is a membrane: leave it to the loss."
    if isinstance(module, _AlwaysDropout):
        return "it drops in eval mode too: F.dropout(x, training=self.training)."
    if isinstance(module, nn.Conv1d):
        return "one-dimensional layers are not mapped: use Conv2d on (B, C, 1, N)."
    return "there is no rule for it."
