"""``net = sparsify(net)``: the report that takes the model's place says what to write instead."""

import copy

import pytest
import torch

from snn_sparse_plugin import UnsupportedError, sparsify

snntorch = pytest.importorskip("snntorch")


@pytest.fixture
def report():
    return sparsify(torch.nn.Sequential(torch.nn.Linear(2, 2), snntorch.Leaky(0.9)))


def test_calling_a_report_says_that_sparsify_works_in_place(report):
    with pytest.raises(UnsupportedError, match=r"in place.*report = sparsify\(net\)"):
        report(torch.ones(1, 2))


@pytest.mark.parametrize("name", ["parameters", "train", "eval", "to", "state_dict", "forward", "zero_grad"])
def test_what_a_module_has_says_the_same_and_stays_an_attribute_error(report, name):
    with pytest.raises(AttributeError, match=rf"no '{name}'.*report = sparsify\(net\)"):
        getattr(report, name)
    assert not hasattr(report, name)


def test_other_names_are_missing_as_usual(report):
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'$"):
        _ = report.nonsense


def test_a_report_can_still_be_copied(report):
    assert copy.copy(report).entries == report.entries
