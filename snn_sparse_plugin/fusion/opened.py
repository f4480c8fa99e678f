"""What runs by itself: ``Lift(nn.Sequential(conv, pool))`` as its convolution and its pool, and what has to run step by
step together with what follows it."""

from __future__ import annotations

from itertools import takewhile

from torch import nn

from ..adapters import has_hooks
from .governor import LARGE
from .modules import applies_per_sample, draws, is_batch_norm, is_unchanged, may_mix
from .stepping import Flow, Layer


def opened(layer: Layer) -> list[Layer]:
    """The modules that a layer applies one after the other, each as a layer of its own over all steps; the layer itself
    where that could be told from what its library does."""
    if layer.adapter is not None or layer.stateful or has_hooks(layer.module):
        return [layer]
    inner = layer.module if layer.wrapper is None else layer.wrapper.unwrap(layer.module)
    if inner is None or (inner is layer.module and not is_unchanged(inner, (nn.Sequential,))):
        return [layer]
    lifted = inner is not layer.module
    name = f"{layer.name}.{_name_in(layer.module, inner)}" if lifted else layer.name
    parts = _parts(name, inner, lifted)
    return parts if parts and _may_stand_alone([part.module for part in parts]) else [layer]


def _name_in(wrapper: nn.Module, inner: nn.Module) -> str:
    return next((name for name, module in wrapper.named_modules() if module is inner), "")


def _parts(name: str, module: nn.Module, lifted: bool) -> list[Layer]:
    if not is_unchanged(module, (nn.Sequential,)) or has_hooks(module):
        return [Layer(name, module, lifted=lifted)]
    # _modules, as named_children() skips a module that is used twice
    children = [(f"{name}.{key}" if name else key, child) for key, child in module._modules.items()]
    return [part for key, child in children if child is not None for part in _parts(key, child, lifted)]


def _may_stand_alone(modules: list[nn.Module]) -> bool:
    """Whether nobody sees that each takes all its steps before the next takes one: no hooks, nothing of unknown
    effect, random numbers drawn by one module alone, and running statistics that one module alone moves on."""
    norms = [m for m in modules if is_batch_norm(m) and m.training]
    return (
        not any(has_hooks(m) or (may_mix(m) and not is_batch_norm(m)) for m in modules)
        and sum(draws(m) for m in modules) <= 1
        and len({id(m) for m in norms}) == len(norms)
    )


def stepped_together(layers: list[Layer], flow: Flow, per_step: bool) -> list[Layer]:
    """The first layer where it has to run step by step and steps are large, and those without weights behind it: each
    finds a step in cache then, and of all steps only what the last one makes is kept. Else none."""
    first, large = layers[0], flow.shape[1:].numel() > LARGE
    if not large or not _may_step(first, per_step) or applies_per_sample(first.module, len(flow.shape)):
        return []

    def follows(layer: Layer) -> bool:
        module = layer.module
        light = is_batch_norm(module) or next(module.parameters(), None) is None
        # of wrappers each takes all its steps before the next takes one
        in_turn = per_step or not (draws(module) or may_mix(module))
        return light and in_turn and _may_step(layer, per_step)

    return [first, *takewhile(follows, layers[1:])]


def _may_step(layer: Layer, per_step: bool) -> bool:
    return layer.adapter is None and not layer.stateful and (per_step or layer.lifted)


def joined(layers: list[Layer]) -> Layer:
    """Layers that run step by step as one."""
    return Layer(layers[0].name, nn.Sequential(*(layer.module for layer in layers)), lifted=True)
