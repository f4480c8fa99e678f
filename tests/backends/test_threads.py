"""Ranges that go through stages on several threads: what each is given, who finishes what, and what fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from snn_sparse_plugin.backends.cpu.threads import in_stages

RANGES = ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("stages", [0, 1, 2, 5])
def test_each_stage_gets_what_the_one_before_gave_for_its_range(count: int, stages: int) -> None:
    for _ in range(50):
        finished: list[int] = []

        def finish(k: int, parts: list[str], finished: list[int] = finished) -> str:
            finished.append(k)
            return "|".join(parts)

        steps = [lambda name, before, k=k: (before or name) + str(k) for k in range(stages)]
        found = in_stages(RANGES[:count], steps, finish)
        ends = ["".join(map(str, range(k + 1))) for k in range(stages)]
        assert found == ["|".join(name + end for name in RANGES[:count]) for end in ends]
        assert sorted(finished) == list(range(stages))


def test_a_range_that_is_ahead_finishes_what_all_have_done() -> None:
    """And not before: the first range waits in its last stage until the other one has ended its second."""
    second, where = threading.Event(), []

    def first_stage(name: str, _: Any) -> str:
        return name

    def second_stage(name: str, _: Any) -> str:
        if name == "b":
            second.set()
        return name

    def third_stage(name: str, _: Any) -> str:
        assert second.wait(10)
        where.append((name, threading.get_ident()))
        return name

    by: dict[int, int] = {}
    in_stages(
        RANGES[:2],
        [first_stage, second_stage, third_stage],
        lambda k, _: by.setdefault(k, threading.get_ident()),
    )
    assert sorted(by) == [0, 1, 2]
    assert by[0] in {thread for _, thread in where}
    assert by[2] == threading.get_ident()  # whoever has called


@pytest.mark.parametrize("where", ["stage", "finish"])
def test_an_error_ends_in_the_calling_thread(where: str) -> None:
    def stage(name: str, _: Any) -> str:
        if where == "stage" and name == "b":
            raise ValueError("in b")
        return name

    def finish(k: int, parts: list[str]) -> list[str]:
        if where == "finish" and k == 0:
            raise ValueError("of the first")
        return parts

    with pytest.raises(ValueError, match="in b" if where == "stage" else "of the first"):
        in_stages(RANGES[:2], [stage, stage], finish)
