"""Ranges that go through stages on several threads: what each is given, who finishes what, and what fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from snn_sparse_plugin.backends.cpu.threads import in_stages

RANGES = ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("stages", [0, 1, 2, 5])
def test_each_stage_gets_what_the_one_before_gave_for_its_range(count: int, stages: int) -> None:
    for _ in range(50):
        finished: list[int] = []

        def finish(k: int, parts: list[str], before: str | None, finished: list[int] = finished) -> str:
            finished.append(k)
            assert (before is None) == (k == 0)
            return "|".join(parts)

        steps = [lambda name, before, k=k: (before or name) + str(k) for k in range(stages)]
        found = in_stages(RANGES[:count], steps, finish)
        ends = ["".join(map(str, range(k + 1))) for k in range(stages)]
        assert found == ["|".join(name + end for name in RANGES[:count]) for end in ends]
        assert finished == list(range(stages))  # one after the other


def test_a_range_that_is_ahead_finishes_what_all_have_done() -> None:
    """The second one waits in its last stage until the first stage has been finished."""
    there, finished = threading.Event(), threading.Event()

    def last_stage(name: str, _: Any) -> str:
        if name == "b":
            there.set()
            assert finished.wait(10)
        else:
            assert there.wait(10)
        return name

    def finish(k: int, parts: list[str], _: Any) -> int:
        if k == 0:
            finished.set()
        return threading.get_ident()

    by = in_stages(RANGES[:2], [lambda name, _: name, last_stage], finish)
    assert by[1] == threading.get_ident()  # whoever has called


def test_what_is_finished_elsewhere_is_made_in_the_mode_of_the_caller() -> None:
    there, finished = threading.Event(), threading.Event()

    def last_stage(name: str, _: Any) -> str:
        if threading.get_ident() == caller:
            there.set()
            assert finished.wait(10)  # so that another thread finishes the first stage
        else:
            assert there.wait(10)
        return name

    def finish(k: int, parts: list[str], _: Any) -> tuple[int, torch.Tensor]:
        if k == 0:
            finished.set()
        return threading.get_ident(), torch.ones(1)

    caller = threading.get_ident()
    with torch.inference_mode():
        (thread, made), (_, last) = in_stages(RANGES[:2], [lambda name, _: name, last_stage], finish)
    assert made.is_inference()
    assert last.is_inference()
    assert thread != caller


@pytest.mark.parametrize("where", ["stage", "finish"])
def test_an_error_ends_in_the_calling_thread(where: str) -> None:
    def stage(name: str, _: Any) -> str:
        if where == "stage" and name == "b":
            raise ValueError("in b")
        return name

    def finish(k: int, parts: list[str], _: Any) -> list[str]:
        if where == "finish" and k == 0:
            raise ValueError("of the first")
        return parts

    with pytest.raises(ValueError, match="in b" if where == "stage" else "of the first"):
        in_stages(RANGES[:2], [stage, stage], finish)
