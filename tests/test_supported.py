"""docs/supported.md is what the adapters say, and no class of either library is missing from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from snn_sparse_plugin.interfaces.cli import app

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")

from snn_sparse_plugin.adapters import loaded_adapters  # noqa: E402
from snn_sparse_plugin.interfaces import supported  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"


def test_the_page_is_current():
    assert PAGE.read_text() == supported.markdown(supported.rows()), (
        "run: snn-sparse supported --markdown > docs/supported.md"
    )


def test_building_the_examples_leaves_no_trace():
    before = list(snntorch.SpikingNeuron.instances)
    supported.rows()
    assert list(snntorch.SpikingNeuron.instances) == before


def test_every_neuron_has_a_row():
    known = {(row.library, row.neuron) for row in supported.rows()}
    missing = set()
    for library, package in (("snntorch", snntorch), ("norse", norse)):
        adapter = next(a for a in loaded_adapters() if a.name == library)
        built = {type(example.build()) for example in adapter.examples().values()}
        for name, cls in vars(package).items():
            if not isinstance(cls, type) or not issubclass(cls, nn.Module) or cls in built:
                continue
            neuron = (
                issubclass(cls, tuple(built)) or hasattr(cls, "initial_state") or "SpikingNeuron" in str(cls)
            )
            if neuron and (library, name) not in known:
                missing.add(name)
    # bases of the others
    assert missing - {"SpikingNeuron", "LIF"} == set()


def test_no_cell_is_empty():
    for row in supported.rows():
        assert all((row.fused, row.per_step, row.recurrence, row.backends, row.exactness)), row


def test_command():
    result = CliRunner().invoke(app, ["supported", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["neuron"]: row for row in json.loads(result.stdout)}
    assert rows["Leaky"]["fused"] == "canonical family"
    assert rows["LIFAdExCell"]["fused"] == "by equations"
    assert rows["SLSTM"]["fused"].startswith("no: ")
    assert "state_quant" in rows["Leaky"]["fallback"]
    assert "Leaky" in CliRunner().invoke(app, ["supported"]).output
