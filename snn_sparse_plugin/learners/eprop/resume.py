"""What a learner saves to go on later, and what modules keep inside themselves from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...core.errors import ConfigError, InputError, UnsupportedError
from .checked import check_state, fitting
from .stepwise import Stepwise
from .structure import Layer


def saved(learner: Stepwise) -> dict[str, Any]:
    """See :meth:`EProp.state_dict`."""
    if any(x.open for x in learner.layers):
        raise ConfigError("state_dict() in the middle of a step: call it after learner.step().")
    if learner.engine == "offline" and learner.readout.pending:
        raise UnsupportedError('engine="offline" has no state within a sequence; use engine="chunk".')
    learner.process(carry=True)
    return {
        "steps_seen": learner.steps_seen,
        "batch": learner._batch,
        "filter": learner.filter,
        "indirect": learner.signals.indirect,
        "feedback": learner.carriers.state_dict(),
        "layers": {x.name: x.state_dict() for x in learner.layers},
        "compiled": [
            {k: v.clone() for k, v in part.items()}
            for part in ([] if learner.compiled is None else learner.compiled.tensors())
        ],
        "buffers": {f"{layer.name}.{k}": v.detach().clone() for layer, k, v in _hidden_buffers(learner)},
    }


def restore(learner: Stepwise, state: dict[str, Any]) -> None:
    """See :meth:`EProp.load_state_dict`."""
    names = {x.name for x in learner.layers}
    layers = state.get("layers") if isinstance(state, dict) else None
    if isinstance(layers, dict) and layers.keys() != names:
        raise ConfigError(
            f"this state belongs to layers {sorted(map(str, layers))}, the model has {sorted(names)}."
        )
    check_state(learner.model, learner.names, state)
    learner.reset()
    learner.steps_seen, learner._batch = state["steps_seen"], state["batch"]
    learner.filter, learner.signals.indirect = state["filter"], state["indirect"]
    learner._confirmed = {}
    learner.carriers.load_state_dict(state["feedback"])
    for layer in learner.layers:
        layer.load_state_dict(state["layers"][layer.name])
    if state["compiled"]:
        try:
            with fitting():
                learner.compile().restore(state["compiled"])
        except InputError:
            learner.reset()  # nothing of a half restored state stays
            raise
    modules = dict(learner.model.named_modules())
    for name, value in state["buffers"].items():
        owner, _, buffer = name.rpartition(".")
        setattr(modules[owner], buffer, value.clone())


def _hidden_buffers(learner: Stepwise) -> Iterator[tuple[Layer, str, Tensor]]:
    # snnTorch keeps hidden states in buffers that its own state_dict leaves out
    for layer in [*learner.structure.hidden, learner.structure.readout]:
        if getattr(layer.module, "init_hidden", False):
            for name in ("mem", "syn", "spk", "syn_exc", "syn_inh"):
                if name in layer.module._buffers:
                    yield layer, name, layer.module._buffers[name]  # type: ignore[misc]


def forget_hidden(learner: Stepwise) -> None:
    """Hidden states that modules keep inside begin anew at the next step."""
    for layer, name, value in _hidden_buffers(learner):
        setattr(layer.module, name, value.new_zeros(0))
