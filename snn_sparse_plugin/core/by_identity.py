"""What is known of a module, for as long as it lives, looked up several times a step."""

from __future__ import annotations

from functools import partial
from typing import Any, Generic, TypeVar
from weakref import ref

V = TypeVar("V")


class ByIdentity(Generic[V]):
    """A ``WeakKeyDictionary`` whose look-up makes no reference, which takes a third of the time."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[V, ref[Any]]] = {}
        self.look = self._found.get
        """:meth:`get` by ``id(key)``, without a call of Python: a tuple of which the first is wanted, or None."""

    def get(self, key: Any) -> V | None:
        found = self._found.get(id(key))
        return None if found is None else found[0]

    def __getitem__(self, key: Any) -> V:
        return self._found[id(key)][0]

    def __setitem__(self, key: Any, value: V) -> None:
        # the callback runs before anything else can get this id
        self._found[id(key)] = value, ref(key, partial(_forget, self._found, id(key)))

    def __contains__(self, key: Any) -> bool:
        return id(key) in self._found

    def __bool__(self) -> bool:
        return bool(self._found)

    def pop(self, key: Any) -> None:
        """Forget what is known, if anything is."""
        self._found.pop(id(key), None)

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()


def _forget(found: dict[int, Any], key: int, _: Any) -> None:
    found.pop(key, None)
