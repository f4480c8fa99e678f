"""What a third-party plugin must be, and how it is asked so that a broken one harms nobody.

Our own plugins are tested, so they are used as they are.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

TIMEOUT = 10.0
"""Seconds in which ``available()`` of a third-party plugin has to answer; it is asked once."""

Report = Callable[[str], None]
"""Takes what is wrong with a plugin, as the end of a sentence about it."""


class Broken(Exception):
    """What is wrong with a plugin."""


def examine(group: str, plugin: Any) -> None:
    """Raise :class:`Broken` where an object lacks what every plugin of its group has."""
    contract = CONTRACTS[group]
    if not contract.attributes and not callable(plugin):
        raise Broken(f"it is {plugin!r}, not {contract.what}")
    for name, (test, expected) in contract.attributes.items():
        try:
            value = getattr(plugin, name)
        except AttributeError:
            raise Broken(f"{_described(plugin)} has no {name}: {contract.advice}") from None
        if not test(value):
            raise Broken(f"its {name} is {value!r}, which has to be {expected}")
    for name in contract.methods:
        if not callable(getattr(plugin, name, None)):
            raise Broken(f"{_described(plugin)} has no method {name}(): {contract.advice}")
    for name in contract.operations:
        if hasattr(plugin, name) and not hasattr(plugin, f"{name}_backward"):
            raise Broken(f"{_described(plugin)} has {name}() without {name}_backward()")
    if contract.operations and not any(hasattr(plugin, name) for name in contract.operations):
        raise Broken(f"{_described(plugin)} has none of the ops {', '.join(contract.operations)}")


def guard(group: str, plugin: Any, report: Report) -> None:
    """Ask ``available()`` once, and have failures and wrong answers of the other questions reported.

    A question that is not answered counts as answered with no.
    """
    if callable(getattr(plugin, "available", None)):
        answer = _in_time(plugin.available)
        if not _verdict(answer):
            raise Broken(f"its available() answered {answer!r}, not (bool, str)")
        plugin.available = lambda: answer
    for name, (test, expected, no) in CONTRACTS[group].questions.items():
        method = getattr(plugin, name)
        setattr(plugin, name, _guarded(method, name, test, expected, no, report))


def _guarded(
    method: Callable[..., Any],
    name: str,
    test: Callable[[Any], bool],
    expected: str,
    no: Callable[[str], Any],
    report: Report,
) -> Callable[..., Any]:
    @functools.wraps(method)
    def ask(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = method(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() is no answer either
            problem = f"its {name}() raised {named(error)}"
        else:
            if test(answer):
                return answer
            problem = f"its {name}() answered {answer!r}, not {expected}"
        report(problem)
        return no(problem)

    return ask


def _in_time(method: Callable[[], Any]) -> Any:
    """The answer of a method, which is left behind where it does not come back."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(method())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="snn-sparse-plugin available()", daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if raised:
        if isinstance(raised[0], KeyboardInterrupt):
            raise raised[0]
        raise Broken(f"its available() raised {named(raised[0])}") from raised[0]
    if not found:
        raise Broken(f"its available() did not answer within {TIMEOUT:g} s")
    return found[0]


def named(error: BaseException) -> str:
    """An exception as the last line of a traceback names it."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _described(plugin: Any) -> str:
    return f"{plugin!r}" if plugin is None or isinstance(plugin, int | float | str) else "it"


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _verdict(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], bool)
        and isinstance(value[1], str)
    )


def _versions(value: Any) -> bool:
    return value is None or (isinstance(value, tuple | list) and len(value) == 2 and all(map(_text, value)))


class Contract(NamedTuple):
    """``attributes``: a test and its words; ``questions``: also what is answered in place of no answer.

    ``operations`` come with a method ``..._backward``, and there is one of them at least.
    """

    what: str
    advice: str
    attributes: Mapping[str, tuple[Callable[[Any], bool], str]]
    methods: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    questions: Mapping[str, tuple[Callable[[Any], bool], str, Callable[[str], Any]]] = {}


_YES_OR_NO = (_bool, "True or False", lambda _: False)
_NAME = (_text, "a string that is not empty")

CONTRACTS = {
    "backends": Contract(
        "a backend",
        "derive it from snn_sparse_plugin.backends.Backend",
        {
            "name": _NAME,
            "priority": (_finite, "a finite number"),
            "equations": (_bool, "True or False"),
            "takes_products": (_bool, "True or False"),
        },
        methods=("available", "supports"),
        operations=("spiking_layer", "ttfs"),
        questions={"supports": (_verdict, "(bool, str)", lambda problem: (False, problem))},
    ),
    "adapters": Contract(
        "an adapter",
        "derive it from snn_sparse_plugin.adapters.Adapter",
        {
            "name": _NAME,
            "package": (_text, "the import name of a library"),
            "tested": (_versions, "None or the oldest and newest version"),
        },
        methods=(
            *("available", "install", "examples", "owns", "masks", "prepare", "container", "stateful"),
            *(
                "unwrap",
                "takes_shape",
                "takes_sequence",
                "only_unroll",
                "neuron",
                "initial_state",
                "final_state",
                "step",
            ),
        ),
        questions={
            "owns": _YES_OR_NO,
            "container": _YES_OR_NO,
            "stateful": _YES_OR_NO,
            "takes_sequence": _YES_OR_NO,
            "only_unroll": (lambda x: isinstance(x, str), "a string", lambda _: ""),
            "unwrap": (lambda x: x is None or callable(x), "a module or None", lambda _: None),
            # what a neuron that nobody can describe counts as: upstream's own, left alone
            "neuron": (lambda x: x is not None, "a Neuron or why it is none", lambda problem: problem),
            "masks": (lambda x: x is None or _text(x), "None or a reason", lambda problem: problem),
            "examples": (lambda x: isinstance(x, Mapping), "a dict", lambda _: {}),
        },
    ),
    "learners": Contract("a learner", "return its class or a factory", {}),
    "layers": Contract(
        "a layer type",
        "give it the attributes of snn_sparse_plugin.layers.ttfs.Plugin",
        {
            "name": _NAME,
            "layers": (lambda x: isinstance(x, tuple | list) and all(map(callable, x)), "a tuple of classes"),
        },
    ),
}
