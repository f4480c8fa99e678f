"""The comparison of trainings: that all libraries train the same, at sizes that say nothing about speed."""

import json
import sys
from pathlib import Path

import pytest

from snn_sparse_plugin import MissingDependencyError
from snn_sparse_plugin.bench import models

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import peers

SMALL = ["--limit", "64", "--T", "25", "--batch", "16", "--hidden", "24", "--threads", "1", "--no-peak"]


def rows_of(path: Path, *options: str) -> dict[str, dict]:
    peers.main([*SMALL, "--json", str(path), *options])
    return {row["provider"]: row for row in json.loads(path.read_text())}


def test_every_library_trains_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for library in ("sklearn", "snntorch", "norse", "spikingjelly"):
        pytest.importorskip(library)
    rows = rows_of(tmp_path / "rows.json", "--steps", "7", "--rounds", "2", "--turn", "2", "--lr", "0.002")
    assert set(rows) == set(peers.PROVIDERS)
    expected = rows["snntorch"]
    for name, row in rows.items():
        assert row["loss_error_at_step_0"] < 1e-5, name
        assert len(row["losses"]) == 7
        assert row["saved_bytes"] > 0
        assert row["seconds_to_loss"] is not None  # of the worst of them
        assert row["seconds_to_loss"] <= 7 * row["step_ms"]["p80"] * 1e3
        if name in ("sparse-exact", "spikingjelly"):  # the same gradient: the same training
            assert row["gradient_error_at_step_0"] < 1e-4, name
            assert row["losses"][:3] == pytest.approx(expected["losses"][:3], rel=1e-3)
    assert rows["sparse"]["losses"][:3] == pytest.approx(rows["sparse-events"]["losses"][:3], rel=1e-3)
    # the surrogate of Norse 1.1 has no slope, and its reset is part of the graph
    assert rows["norse"]["gradient_error_at_step_0"] > 0.1
    assert expected["losses"][-1] < expected["losses"][0]
    assert "s to loss" in capsys.readouterr().out


def test_a_library_that_is_missing_is_a_skipped_row(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("snntorch")
    require = models._require

    def without_norse(module: str, install: str) -> object:
        if module == "norse.torch":
            raise MissingDependencyError(f"{module} cannot be imported: pip install {install}")
        return require(module, install)

    monkeypatch.setattr(models, "_require", without_norse)
    options = ["--steps", "2", "--rounds", "1", "--providers", "sparse-events", "snntorch", "norse"]
    rows = rows_of(tmp_path / "rows.json", *options)
    assert "pip install norse" in rows["norse"]["skipped"]
    assert rows["snntorch"]["skipped"] is None
    assert "skipped norse" in capsys.readouterr().out


def test_another_computation_is_refused(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("snntorch")
    enter = peers.enter

    def different(name, config, problem, lr):
        if name == "snntorch":
            problem = problem._replace(weights=tuple(1.5 * w for w in problem.weights))
        return enter(name, config, problem, lr)

    monkeypatch.setattr(peers, "enter", different)
    with pytest.raises(SystemExit, match="does not compute the same"):
        rows_of(tmp_path / "rows.json", "--steps", "1", "--providers", "snntorch", "sparse-exact")
