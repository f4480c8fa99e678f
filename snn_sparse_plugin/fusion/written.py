"""Writing to borrowed tensors what was noted for them (:mod:`.in_place`), after the steps of a record have run."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from .context import in_mode
from .nodes import Borrowed, Node, WriteNode
from .recordable import filled
from .recorded import Recorded
from .series import piece, stacked


def written(node: Node, x: Recorded, value: Tensor | None) -> Tensor:
    """The borrowed tensor behind ``x`` with what was done to it, after its steps have run."""
    borrowed: Borrowed = x._borrowed  # type: ignore[attr-defined]
    home = borrowed.home
    with in_mode(node.mode):
        made = _write_all(node) if isinstance(node, WriteNode) else 1
        if value is not None:
            home.copy_(value)
        for _ in range(borrowed.changes - made):
            increment_version(home)
    return home


def _write_all(node: WriteNode) -> int:
    """Write everything: -> in how many calls. Successive steps at successive places are one."""
    home, (at, n) = node.home, (_successive(node), len(node))
    if at is not None and n > 1:
        values = stacked(node.arguments[0])
        home.narrow(at[0], at[1], n).copy_(values.movedim(0, at[0]))
        return 1
    for call, (func, form) in enumerate(node.forms):
        func(home, *filled(form, [piece(argument[call]) for argument in node.arguments]))
    return n


def _successive(node: WriteNode) -> tuple[int, int] | None:
    """The dimension and the first number of ``x[k] = …`` for k that counts up, None of other writes."""
    home = node.home
    if any(func is not Tensor.__setitem__ for func, _ in node.forms):
        return None
    places = [place_in(form, home.dim()) for _, form in node.forms]
    first = places[0]
    if first is None or first[1] < 0 or any(p != (first[0], first[1] + k) for k, p in enumerate(places)):
        return None
    one = (*home.shape[: first[0]], *home.shape[first[0] + 1 :])
    argument = node.arguments[0]
    whole = argument.range() is not None and argument.range()[0].shape == one  # type: ignore[index]
    return first if whole else None


def place_in(form: Any, dims: int) -> tuple[int, int] | None:
    """Dimension and number of ``x[k] = …``, ``x[:, k] = …``, ``x[..., k] = …``, None of another index."""
    index = form[0] if type(form[0]) is tuple else (form[0],)
    numbers = [k for k, part in enumerate(index) if type(part) is int]
    if len(numbers) != 1 or len(index) > dims:
        return None
    (at,) = numbers
    ellipses = [k for k, part in enumerate(index) if part is ...]
    if len(ellipses) > 1 or any(
        part is not ... and part != slice(None) for k, part in enumerate(index) if k != at
    ):
        return None
    dim = at - len(index) + dims if ellipses and ellipses[0] < at else at
    return dim, index[at]
