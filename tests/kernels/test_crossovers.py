"""The table of where one way to multiply beats another: built in, in a file, and in a broken one."""

import json
import logging
import math

import pytest
import torch
from typer.testing import CliRunner

from snn_sparse_plugin.interfaces.cli import app
from snn_sparse_plugin.triton_kernels import choice, crossovers
from snn_sparse_plugin.triton_kernels.crossovers import H100, UNMEASURED, Crossovers

CARD = torch.device("cuda")
TABLE = Crossovers(((256, 0.2), (math.inf, 0.1)), ((math.inf, 0.0),), ((64, 0.5), (math.inf, 1.0)), 1e6)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SNN_SPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossovers, "name_of", lambda _: "NVIDIA H100 80GB HBM3")
    crossovers.of_device.cache_clear()
    yield tmp_path / "crossovers"
    crossovers.of_device.cache_clear()


def test_the_table_of_an_h100_is_built_in(home, monkeypatch):
    assert crossovers.of_device(CARD) is H100
    crossovers.of_device.cache_clear()
    monkeypatch.setattr(crossovers, "name_of", lambda _: "another card")
    assert crossovers.of_device(CARD) is UNMEASURED
    assert UNMEASURED.terms_from == math.inf


def test_a_written_table_is_read(home):
    path = crossovers.file_of("NVIDIA H100 80GB HBM3")
    assert path == home / "NVIDIA-H100-80GB-HBM3.json"
    crossovers.write(path, TABLE, device="NVIDIA H100 80GB HBM3")
    assert crossovers.of_device(CARD) == TABLE
    assert json.loads(path.read_text())["device"] == "NVIDIA H100 80GB HBM3"
    crossovers.write(path, TABLE._replace(terms_from=math.inf))
    assert crossovers.of_device(CARD).terms_from == math.inf


WHOLE = crossovers.plain(TABLE)
BROKEN = {
    "half written": '{"rows_below_fl',
    "no table": "[1, 2]",
    "an entry missing": json.dumps({k: v for k, v in WHOLE.items() if k != "terms_from"}),
    "words": json.dumps(WHOLE | {"terms_from": "many"}),
    "NaN": json.dumps(WHOLE | {"terms_from": math.nan}),
    "negative": json.dumps(WHOLE | {"rows_below_tf32": [[None, -1]]}),
    "no limits": json.dumps(WHOLE | {"rows_below_tf32": []}),
    "no last width": json.dumps(WHOLE | {"rows_below_tf32": [[256, 0.1]]}),
    "no pairs": json.dumps(WHOLE | {"rows_below_tf32": [0.1, 0.2]}),
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_the_built_in_table_used(home, caplog, text):
    path = crossovers.file_of("NVIDIA H100 80GB HBM3")
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, "snn_sparse_plugin"):
        assert crossovers.of_device(CARD) is H100
        assert crossovers.of_device(CARD) is H100
    (said,) = caplog.messages
    assert str(path) in said
    assert "snn-sparse tune" in said


@pytest.mark.parametrize(("width", "expected"), [(10, 0.2), (256, 0.2), (257, 0.1), (10**9, 0.1)])
def test_a_limit_depends_on_the_width(width, expected):
    assert crossovers.limit(TABLE.rows_below_float32, width) == expected


@pytest.fixture
def by_precision():
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    yield lambda tf32: setattr(matmul, name, tf32 if name == "allow_tf32" else "tf32" if tf32 else "ieee")
    setattr(matmul, name, before)


def test_terms_are_for_large_float32_products_without_tf32(monkeypatch, by_precision):
    monkeypatch.setattr(choice, "of_device", lambda _: TABLE)
    by_precision(False)
    weight = torch.empty(100, 100)
    assert choice.pairs_for_input_gradient(100, weight)
    assert not choice.pairs_for_input_gradient(99, weight)
    assert not choice.pairs_for_input_gradient(100, weight.double())
    assert not choice.pairs_for_input_gradient(200, torch.empty(102, 100))  # rows of 4 bytes
    by_precision(True)
    assert not choice.pairs_for_input_gradient(100, weight)


def test_tf32_is_a_candidate_where_it_is_allowed(monkeypatch, by_precision):
    monkeypatch.setattr(choice, "of_device", lambda _: TABLE)
    monkeypatch.setattr(choice, "_seen", {})
    x, weight = torch.zeros(10, 2, 50), torch.empty(10, 50)
    by_precision(False)
    assert choice.adds_rows("layer", x, weight)
    by_precision(True)
    assert not choice.adds_rows("layer", x, weight)


def test_the_choice_is_said_once(monkeypatch, caplog, by_precision):
    by_precision(False)
    monkeypatch.setattr(choice, "of_device", lambda _: TABLE._replace(terms_from=0))
    monkeypatch.setattr(choice, "_seen", {})
    words, weight = torch.full((10, 2, 2), -1, dtype=torch.int32), torch.empty(8, 64)
    with caplog.at_level(logging.DEBUG, "snn_sparse_plugin"):
        assert [choice.adds_rows_of_bits("fc→lif", words, weight) for _ in range(3)] == [False] * 3
    (said,) = caplog.messages
    assert said == "fc→lif: 100 % of the input (10, 2, 2) is not zero: bf16 terms multiply it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tune_says_that_there_is_no_gpu(home):
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1
    assert "torch sees no CUDA or ROCm device" in result.output
    assert not home.exists()
