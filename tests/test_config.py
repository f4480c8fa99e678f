"""Options of sparse mode: what is taken, and what is refused when the config is made."""

import numpy as np
import pytest
import torch

from snn_sparse_plugin import ConfigError, SparseConfig, UnsupportedError, sparse_mode


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25)])
def test_numbers_of_numpy_and_torch_become_pythons(number):
    config = SparseConfig(backprop_threshold=number, min_active=number)
    assert (config.backprop_threshold, config.min_active) == (0.25, 0.25)
    assert type(config.backprop_threshold) is type(config.min_active) is float


def test_steps_and_flags_of_numpy_and_torch_become_pythons():
    config = SparseConfig(max_steps=np.int64(3), check=np.bool_(True), fuse_time=torch.tensor(False))
    assert (config.max_steps, config.check, config.fuse_time) == (3, True, False)
    assert type(config.max_steps) is int


def test_a_tensor_that_changes_between_two_blocks_is_read_again():
    threshold = torch.tensor(0.25)
    with sparse_mode(backprop_threshold=threshold) as first:
        threshold.fill_(0.5)
        with sparse_mode(backprop_threshold=threshold) as second:
            assert (first.backprop_threshold, second.backprop_threshold) == (0.25, 0.5)


@pytest.mark.parametrize(
    "number", [np.float32("nan"), torch.tensor(-1.0), torch.tensor([0.2]), np.bool_(True)]
)
def test_a_threshold_outside_its_range_is_refused_whatever_its_type(number):
    with pytest.raises(ConfigError, match="backprop_threshold must be"):
        SparseConfig(backprop_threshold=number)


@pytest.mark.parametrize(
    ("name", "meant"), [("cuda", "triton"), ("gpu", "triton"), ("torchsparse", "torch_sparse")]
)
def test_an_unknown_backend_is_refused_at_once_with_the_names(name, meant):
    with pytest.raises(UnsupportedError, match=rf"{name}.*Did you mean '{meant}'\?.*reference"):
        SparseConfig(backend=name)
    with pytest.raises(UnsupportedError, match=name), sparse_mode(backend=name):
        pytest.fail("the block was entered")
