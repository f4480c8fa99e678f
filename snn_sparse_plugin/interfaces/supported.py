"""What runs how: one row for every neuron class that an adapter knows. ``docs/supported.md`` is made from it.

Only how to build an example of each class, and how exact it is (which the tests of every neuron check), is written by
hand: whether it is fused, with which equations, what takes the fallback and why are asked of the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..adapters import Adapter, Example, Neuron, loaded_adapters
from ..backends import Backend
from ..core import registry
from ..core.dynamics import NeuronSpec
from ..core.equations import Equations


@dataclass(frozen=True)
class Row:
    """One neuron class, in words."""

    library: str
    neuron: str
    fused: str
    per_step: str
    fallback: dict[str, str]
    """The options that are not fused, and why."""
    recurrence: str
    backends: tuple[str, ...]
    exactness: str
    fused_options: tuple[str, ...] = field(default=())


EXACT = "bit for bit"
"""On weights whose sums are exact in any order; on others sums over inputs are rounded in another order."""


def rows(adapters: Iterable[Adapter] | None = None) -> list[Row]:
    """A row for every neuron class of the imported libraries, by library and name."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some options warn when they are built
        for adapter in loaded_adapters() if adapters is None else adapters:
            for name, example in sorted(adapter.examples().items()):
                found.append(_row(adapter, name, example))
    return found


def _row(adapter: Adapter, name: str, example: Example) -> Row:
    module = example.build()
    neuron = adapter.neuron(module)
    unmasked = adapter.masks(module)
    fallback, fused = {}, []
    for option in example.options:
        try:
            other = adapter.neuron(example.with_option(option))
        except Exception as error:  # upstream refuses the option
            fallback[option] = f"{adapter.name} itself raises {type(error).__name__}"
            continue
        if isinstance(other, str):
            fallback[option] = other
        else:
            fused.append(option)
    if isinstance(neuron, str):
        fallback = {"every option": neuron}
    return Row(
        library=adapter.name,
        neuron=name,
        fused=_kind(neuron, adapter.only_unroll(module)),
        per_step="masked surrogate" if unmasked is None else f"as upstream: {unmasked}",
        fallback=fallback,
        recurrence=_recurrence(module, neuron),
        backends=_backends(neuron),
        exactness="masked gradient" if isinstance(neuron, str) else example.exactness or EXACT,
        fused_options=tuple(fused),
    )


def _kind(neuron: Neuron | str, only_unroll: str) -> str:
    if isinstance(neuron, str):
        return f"no: {neuron}"
    kind = "canonical family" if isinstance(neuron.spec, NeuronSpec) else "by equations"
    return f"{kind}; by `unroll` alone: {only_unroll}" if only_unroll else kind


def _recurrence(module: nn.Module, neuron: Neuron | str) -> str:
    if isinstance(neuron, str):
        return (
            "upstream's" if hasattr(module, "recurrent_weights") or hasattr(module, "recurrent") else "none"
        )
    if neuron.recurrent_diagonal is not None:
        return "one-to-one"
    return "none" if neuron.recurrent_weight is None else "all-to-all"


def _backends(neuron: Neuron | str) -> tuple[str, ...]:
    if isinstance(neuron, str):
        return ("upstream's own",)
    equations = isinstance(neuron.spec, Equations)
    loaded: dict[str, Backend] = registry.load_all("backends")
    able = [b for b in loaded.values() if b.equations or not equations]
    return tuple(b.name for b in sorted(able, key=lambda b: -b.priority))


def joined(options: Iterable[str]) -> list[str]:
    """Labels of options, with all values of one behind its name.

    Example:
        >>> joined(["dt", "method=tanh", "method=circ"])
        ['dt', 'method=tanh/circ']
    """
    values: dict[str, list[str]] = {}
    for option in options:
        name, _, value = option.partition("=")
        values.setdefault(name, []).extend([value] if value else [])
    return [f"{name}={'/'.join(found)}" if found else name for name, found in values.items()]


def as_dicts(table: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in table]


def markdown(table: list[Row]) -> str:
    """The whole of ``docs/supported.md``."""
    lines = [
        "# Supported neurons",
        "",
        "Made by `snn-sparse supported --markdown` from the adapters; a test compares it with what they say now.",
        "",
        "* **fused**: runs over all time steps in one call: of `unroll`, of a step loop in sparse mode, or of a module",
        "  that takes all steps: as a member of the canonical family (kernels of its own) or by its equations (one",
        "  kernel for all). `by unroll alone` says why a loop or a call in sparse mode runs upstream's own forward",
        "  instead, with the gradient masked. `no` says why a neuron is never fused; it runs step by step then.",
        "* **per step**: what a step-by-step loop gets in sparse mode: upstream's spikes bit for bit, the gradient",
        "  masked.",
        "* **fused with**: options of the class that stay fused.",
        "* **not fused with**: options of the class with which it takes the per-step path instead, and why. An initial",
        "  state may be given to every neuron, and parameters may be learned.",
        "* **exactness** of the fused path in exact mode: spikes and states against upstream's, on weights whose sums",
        "  are exact in any order (gradients: within 1e-5). On other weights sums are rounded in another order.",
        "",
    ]
    for library in dict.fromkeys(row.library for row in table):
        lines += [f"## {library}", "", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
        for row in (r for r in table if r.library == library):
            cells = (
                f"`{row.neuron}`",
                row.fused,
                row.per_step,
                ", ".join(f"`{o}`" for o in joined(row.fused_options)) or "none",
                "; ".join(f"`{o}`: {why}" for o, why in row.fallback.items()) or "none",
                row.recurrence,
                ", ".join(row.backends),
                row.exactness,
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


_COLUMNS = (
    *("neuron", "fused", "per step", "fused with", "not fused with"),
    *("recurrence", "backends", "exactness"),
)
