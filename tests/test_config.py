"""Options of sparse mode: their values, their names, and what is said of wrong ones before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin import ConfigError, InputError, SparseConfig, UnsupportedError, sparse_mode, sparsify
from snn_sparse_plugin.adapters import MARK

NUMBERS = [
    *(np.float32(0.25), np.float64(0.25), np.float16(0.25), np.array(0.25)),
    *(torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64, requires_grad=True)),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}-{n.dtype}")
def test_scalars_of_numpy_and_torch_are_numbers(number):
    with sparse_mode(backprop_threshold=number, min_active=number) as config:
        assert (config.backprop_threshold, config.min_active) == (0.25, 0.25)
        assert type(config.backprop_threshold) is type(config.min_active) is float
    assert SparseConfig(backprop_threshold=number) == SparseConfig(backprop_threshold=0.25)


def test_the_other_options_may_be_scalars_too():
    given = {
        "max_steps": np.int64(4),
        "check": np.bool_(True),
        "fuse_time": torch.tensor(False),
        "backend": np.str_("cpu"),
    }
    config = SparseConfig(**given)
    assert (config.max_steps, config.check, config.fuse_time, config.backend) == (4, True, False, "cpu")
    assert all(type(getattr(config, name)) in (int, bool, str) for name in given)
    assert SparseConfig(max_steps=torch.tensor(4)).max_steps == 4


def test_a_tensor_that_changes_later_changes_no_option():
    threshold = torch.tensor(0.25)
    net = nn.Sequential(pytest.importorskip("snntorch").Leaky(beta=0.9))
    report = sparsify(net, backprop_threshold=threshold)
    threshold.fill_(0.5)
    assert report.config.backprop_threshold == 0.25
    assert getattr(net[0], MARK).overrides == {"backprop_threshold": 0.25}
    with sparse_mode(backprop_threshold=threshold) as config:
        assert config.backprop_threshold == 0.5


@pytest.mark.parametrize(
    "value",
    [
        *(np.float32("nan"), np.float32(-1), np.array([0.2]), np.bool_(True), np.complex64(1)),
        *(torch.tensor([0.2]), torch.tensor(True), torch.empty((), device="meta")),
    ],
    ids=repr,
)
def test_scalars_outside_the_range_are_refused(value):
    with pytest.raises(ConfigError, match="backprop_threshold must be"):
        SparseConfig(backprop_threshold=value)
    with pytest.raises(ConfigError, match="max_steps must be"):
        SparseConfig(max_steps=value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (0.2, "backprop_threshold=0.2"),
        (np.float64(0.2), "backprop_threshold=0.2"),
        (None, "backprop_threshold=None"),
        ("auto", "backprop_threshold='auto'"),
        ("cpu", "backend='cpu'"),
        (False, "fuse_time=False"),
        (SparseConfig(min_active=0.0), "min_active=0.0"),
        ([0.2], ""),
    ],
    ids=repr,
)
def test_an_option_without_its_name_is_answered_with_the_call_that_was_meant(value, meant):
    for what, call in (
        ("sparse_mode(", sparse_mode),
        ("sparsify(net", lambda v: sparsify(nn.Linear(2, 2), v)),
    ):
        with pytest.raises(ConfigError, match="takes its options by name") as error:
            call(value)
        assert what in str(error.value)
        assert f"{meant})." in str(error.value)


def test_a_model_or_a_function_in_the_wrong_place():
    with pytest.raises(InputError, match=r"takes no model, got Linear.*sparsify\(net\)"):
        sparse_mode(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"write @sparse_mode\(\)"):

        @sparse_mode
        def train():
            pass

    @sparse_mode(min_active=0)
    def options():
        return ssp.config.active_config().min_active

    assert [options(), options()] == [0, 0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("cuda", "triton"), ("cuda:0", "triton"), ("GPU", "triton"), ("trition", "triton")),
        *(("numba", "cpu"), ("CPU", "cpu"), ("torch", "reference"), ("torch-sparse", "torch_sparse")),
        ("quantum", None),
    ],
)
def test_an_unknown_backend_is_refused_at_once(name, meant):
    hint = "" if meant is None else rf" Did you mean '{meant}'\?"
    message = rf"no backend named '{name}'. Registered: cpu, reference, torch_sparse, triton\.{hint}$"
    net = nn.Sequential(pytest.importorskip("snntorch").Leaky(beta=0.9))
    with pytest.raises(UnsupportedError, match=message), sparse_mode(backend=name):
        raise AssertionError("entered")
    with pytest.raises(UnsupportedError, match=message):
        sparsify(net, backend=name)
    assert MARK not in vars(net[0])
    with pytest.raises(UnsupportedError, match=message):
        ssp.unroll(net, torch.rand(3, 2, 4), backend=name)
    with pytest.raises(UnsupportedError, match=message):
        SparseConfig(backend=name)


class TestTheReportInPlaceOfTheModel:
    """``net = sparsify(net)``"""

    @pytest.fixture
    def report(self):
        snntorch = pytest.importorskip("snntorch")
        return sparsify(nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True)))

    IN_PLACE = r"works in place.*report = sparsify\(net\), and go on with net"

    def test_called(self, report):
        with pytest.raises(UnsupportedError, match=self.IN_PLACE):
            report(torch.ones(2, 4))

    @pytest.mark.parametrize("name", ["parameters", "train", "eval", "to", "state_dict", "fc1", "cuda"])
    def test_asked_for_what_a_model_has(self, report, name):
        assert not hasattr(report, name)
        assert getattr(report, name, None) is None
        with pytest.raises(AttributeError, match=f"no attribute '{name}'.*{self.IN_PLACE}"):
            getattr(report, name)

    def test_it_is_copied_pickled_and_compared_as_before(self, report):
        import copy
        import pickle

        assert copy.copy(report) == copy.deepcopy(report) == pickle.loads(pickle.dumps(report)) == report
        assert not hasattr(report, "__array__")
