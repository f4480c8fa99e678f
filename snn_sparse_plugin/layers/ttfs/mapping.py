"""From trained TTFS layers to the spiking network with the same spike times: :func:`to_snn`."""

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import InputError, UnsupportedError
from .convert import is_neuron
from .network import TTFSNetwork
from .neuron import TTFS
from .stages import Pool, Stage

_PASS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_LEAVES = (TTFS, nn.Linear, nn.Conv2d, _BatchNorm, nn.MaxPool2d, nn.AvgPool2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # also subclasses of torch's layers, which fx would look into
        return (
            isinstance(module, _LEAVES) or is_neuron(module) or super().is_leaf_module(module, qualified_name)
        )


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps the shape of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.shapes[n] = tuple(out.shape)
        return out


def to_snn(model: nn.Module, example: Tensor, *, exact_grid: bool = False) -> TTFSNetwork:
    """The spiking network that a trained TTFS model equals, spike for spike.

    Batch normalisation is folded into the weights; convolutions, linear layers, max and average pooling, flattening and
    dropout are mapped; the first layer must be a :class:`TTFSEncoder` and the last one is read as membrane. Works on
    sequential models and on any module that ``torch.fx`` can trace into a chain.

    Args:
        model: in eval mode.
        example: a batch (B, …) of intensities in [0, 1], for shapes.
        exact_grid: put weights and kernels on a binary grid, :meth:`TTFSNetwork.on_grid`.

    Raises:
        UnsupportedError: a layer that cannot be mapped, named, with the reason.
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
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} has NaN or infinite values; the network cannot be mapped.")
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
    net = _Builder(graph, shapes.shapes, source).build()
    return net.on_grid() if exact_grid else net


class _Builder:
    """Walks the chain of nodes and collects stages."""

    def __init__(
        self, graph: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], source: nn.Module
    ) -> None:
        self.modules = dict(graph.named_modules())
        self.graph, self.shapes, self.source = graph, shapes, source
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
            if node.op != "output" and len(node.users) > 1:
                users = ", ".join(n.name for n in node.users)
                raise self.refuse(
                    node, f"its output goes to {users}; residual and parallel paths are not mapped."
                )
            if node.op in ("call_module", "call_function", "call_method"):
                self.step(node)
            elif node.op == "get_attr":
                raise self.refuse(node, "a tensor used outside a layer.")
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

    def step(self, node: fx.Node) -> None:
        shape = self.shapes[node][1:]
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if module is None:
            self.function(node, shape)
        elif isinstance(module, TTFS):
            self.neurons(node, module, shape)
        elif self.encoder is None and not isinstance(module, _PASS):
            raise self.refuse(node, "the input arrives as numbers, not as spikes: put a TTFSEncoder first.")
        elif isinstance(module, nn.Linear | nn.Conv2d):
            self.connect(node, module, shape)
        elif isinstance(module, _BatchNorm):
            self.fold(node, module)
        elif isinstance(module, nn.Unflatten):
            if self.pending is not None or self.before:
                raise self.refuse(node, "put it right behind a TTFS layer.")
            self.in_shape = shape
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.Flatten):
            self.rearrange(node, module, shape)
        elif not isinstance(module, _PASS):
            raise self.refuse(node, _hint(module))

    def function(self, node: fx.Node, shape: tuple[int, ...]) -> None:
        arriving = next(
            (self.shapes[a] for a in node.args if isinstance(a, fx.Node) and a in self.shapes), None
        )
        flattens = node.target in (torch.flatten, "flatten", "view", "reshape", torch.reshape)
        if (
            flattens
            and arriving is not None
            and len(shape) == 1
            and shape[0] == torch.Size(arriving[1:]).numel()
        ):
            self.flatten(node)
        elif node.target in (operator.add, operator.iadd, torch.add, "add", "add_"):
            raise self.refuse(node, "residual and parallel paths are not mapped.")
        elif node.target in (F.relu, torch.relu, "relu", "relu_"):
            raise self.refuse(node, "a ReLU has no spike times: use the TTFS layer as a module.")
        elif node.target in ("contiguous", F.dropout):
            return
        else:
            raise self.refuse(node, "only modules, flatten, view and reshape to (B, N) are mapped.")

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

    def flatten(self, node: fx.Node) -> None:
        if self.pending is not None:
            self.pending = replace(self.pending, flatten_after=True)

    def rearrange(self, node: fx.Node, module: nn.Module, shape: tuple[int, ...]) -> None:
        if isinstance(module, nn.Flatten):
            if len(shape) != 1:
                raise self.refuse(node, "only flattening to (B, N) is mapped.")
            self.flatten(node)
        elif isinstance(module, nn.MaxPool2d):
            if module.return_indices:
                raise self.refuse(node, "return_indices=True.")
            kernel, stride = _pair(module.kernel_size), _pair(module.stride)
            pool = Pool(
                "max", kernel, stride, _pair(module.padding), _pair(module.dilation), module.ceil_mode
            )
            if (
                self.pending is not None
            ):  # the largest membrane fires first, so pooling can wait for the spikes
                self.pending = replace(self.pending, after=[*self.pending.after, pool])
            elif any(p.kind == "avg" for p in self.before):
                raise self.refuse(
                    node, "what an average pooling passes is not a spike that can be the earliest."
                )
            else:
                self.before.append(pool)
        else:
            assert isinstance(module, nn.AvgPool2d)
            kernel, stride = _pair(module.kernel_size), _pair(module.stride)
            plain = kernel == stride and _pair(module.padding) == (0, 0) and not module.ceil_mode
            if self.pending is not None:
                raise self.refuse(node, "it averages membranes: put it behind the TTFS layer.")
            if not plain or module.divisor_override is not None or any(p.kind == "avg" for p in self.before):
                raise self.refuse(
                    node, "only one average pooling of windows side by side, without padding, is mapped."
                )
            self.before.append(Pool("avg", kernel, stride))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _hint(module: nn.Module) -> str:
    if isinstance(module, nn.ReLU) or is_neuron(module):
        return "it has no spike times of this coding: convert the model with to_ttfs and train it."
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        return "the readout is a membrane: leave it to the loss."
    if isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return "use AvgPool2d or MaxPool2d with the size it has here."
    return "there is no rule for it."
