"""Running a record: which nodes are wanted, in which order, and which have to go step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import tally
from ..core.errors import FusionError
from ..core.precision import without_autocast
from .context import here, in_mode, paused
from .governor import judge
from .nodes import FunctionNode, NeuronNode, Node
from .places import note_places, wants_places
from .planner import Plan
from .record import Record, check_versions, reasons
from .recorded import Recorded, give_back, value_of
from .running import run_node, run_steps
from .written import written


def flush(
    record: Record | None = None, reason: Any = "flush()", *, stepped: bool = False, apart: bool = False
) -> None:
    """Run what this thread has recorded; the recorded tensors become ordinary ones.

    Seldom needed: whatever wants numbers does it. ``stepped``: by upstream's own steps, one after the other, so that
    every value has the place in the graph that it has in the step loop. ``apart``: C++ code may be holding the tensors.

    Raises:
        FusionError: a tensor that a recorded step reads was changed in place in the meantime.
    """
    record = here.record if record is None else record
    if record is None:
        return
    if record.entered():  # by what this one interrupts, which is writing to it or running it
        return
    with record.lock:  # another thread may be running it: its numbers are there when the lock is free
        if record.closed:
            return
        record.closed = True
        if here.record is record:
            here.record = None
        if not record.nodes:
            return
        reasons[reason if isinstance(reason, str) else getattr(reason, "__name__", str(reason))] += 1
        try:
            # whoever wants the numbers may be in a mode that the steps were not in
            with paused(), torch._C.DisableTorchFunction(), without_autocast():
                _run(record, stepped, apart)
        except BaseException as error:
            record.error = error
            for *_, x in record.waiting():
                if "_borrowed" in x.__dict__:  # the user's own tensor is as it was
                    give_back(x, x.__dict__["_borrowed"].home)
            raise
        finally:
            record.close()


tally.settle.append(lambda: flush(reason="a report"))


def realize(items: Any, reason: Any, run: Callable[..., None] = flush) -> None:
    """Run the records of all recorded tensors within ``items``."""
    stepped: bool | None = None
    for x in _recorded_in((items,), []):
        value = value_of(x)
        if value is not None:
            record = value[0].record
            stepped = wants_places(reason, items) if stepped is None else stepped
            run(record, reason, stepped=stepped)
            if type(x) is Recorded and record.entered():
                raise FusionError(
                    f"the step recorded at {value[0].where} is being recorded or computed at this moment: what "
                    f"interrupts that (a finalizer, a signal handler, a function that the record calls) cannot have it."
                )
            if type(x) is Recorded:
                raise FusionError(
                    f"the step recorded at {value[0].where} was never computed, as running the record failed: "
                    f"{record.error}"
                ) from record.error


def _recorded_in(items: Any, found: list[Recorded]) -> list[Recorded]:
    for item in items.values() if isinstance(items, dict) else items:  # asked at every step of a neuron
        if type(item) is Recorded:
            found.append(item)
        elif isinstance(item, tuple | list | set | dict):
            _recorded_in(item, found)
    return found


def _run(record: Record, stepped: bool, apart: bool) -> None:
    waiting = record.waiting()
    # who watches the neurons wants to see steps that nobody uses
    seen = tally.watchers.get() is not None
    watched = [node for node in record.nodes if isinstance(node, NeuronNode)] if seen else []
    if not waiting and not watched:
        return
    for entered in record.inputs.values():
        entered.finish()
    plan = Plan(waiting, watched, stepped)
    check_versions(plan.sources)
    record.plain.check()
    for node in plan.sources:
        node.complete()
    one_by_one: set[Node] = set()
    for group in plan.groups:
        try:
            if len(group) == 1 and not stepped and not plan.feeds_itself(group[0]):
                with in_mode(group[0].mode):
                    run_node(group[0], plan)
            else:
                run_steps(group, plan)
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note(f"The step was recorded at {group[0].where}.")
            raise
        one_by_one.update(n for n in group if n.results[0] is not None and n.results[0].pieces is not None)
        plan.ran(group)
    judge(plan, one_by_one)
    for node in plan.sources:
        if isinstance(node, NeuronNode):
            node.adapter.leave(node.module)
    real = _values(waiting, plan)
    for (_, _, _, found), tensor in zip(waiting, real, strict=True):
        found.become(tensor, apart)
    if not stepped:
        note_places(waiting, plan)


def _values(waiting: list[tuple[Node, int, int, Recorded]], plan: Plan) -> list[Tensor]:
    """The tensors that the user's objects become, in the order of ``waiting``."""
    calls: dict[tuple[Node, int], list[int]] = {}
    for node, slot, call, _ in waiting:
        if node.readable:
            calls.setdefault((node, slot), []).append(call)
    found: dict[Any, Tensor] = {}  # by value: node, call, slot
    for (node, slot), wanted in calls.items():
        with in_mode(node.mode):
            found.update(
                {(node, call, slot): x for call, x in zip(wanted, plan.own(node, slot, wanted), strict=True)}
            )
    for node, slot, call, recorded in waiting:
        if "_borrowed" in recorded.__dict__:
            found[node, call, slot] = written(node, recorded, found.get((node, call, slot)))
    # a view of something that the user holds as well stays a view of it
    for node, slot, call, _ in waiting:
        if isinstance(node, FunctionNode) and node.view:
            sources = [argument[call] for argument in node.arguments]
            if any(source in found for source in sources):
                with in_mode(node.mode):
                    found[node, call, slot] = plan.call(
                        node, [found.get(s) if len(s) == 3 else s[0] for s in sources], call
                    )
    seen: set[int] = set()
    values = []
    for node, slot, call, _ in waiting:
        x = found[node, call, slot]
        if id(x) in seen:
            x = x.view_as(x)
        seen.add(id(x))
        values.append(x)
    return values
