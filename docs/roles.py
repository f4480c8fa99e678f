"""Docstrings are written for Python's own help: roles such as :class:`~a.b.C` become `C` on the site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):`(?:[^`<]*<)?(~?)([^`>]+)>?`")


class Roles(Extension):
    """Sphinx's roles as code, and ``Example:`` as the section that shows its prompts as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(_name, obj.docstring.value)
            obj.docstring.value = text.replace("``", "`").replace("Example:\n", "Examples:\n")


def _name(role: re.Match[str]) -> str:
    short, target = role.groups()
    return f"`{target.rpartition('.')[2] if short else target.removeprefix('snn_sparse_plugin.')}`"
