"""SpikeTrain: forms, gradients, bad input."""

import numpy as np
import pytest
import torch
from helpers import relative, spikes
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_sparse_plugin import InputError, MissingDependencyError, NeuronParams, SpikeTrain
from snn_sparse_plugin.core.csr import events_from_dense
from snn_sparse_plugin.core.spikes import Active, as_spike_train
from snn_sparse_plugin.ops import spiking_layer


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 5),
    B=st.integers(0, 4),
    features=st.lists(st.sampled_from([0, 1, 3, 15, 16, 17, 40]), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    graded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_round_trip(T, B, features, p, graded, dtype):
    x = spikes(T, B, *features, p=p).to(dtype)
    if graded:
        x = x * torch.rand_like(x).clamp(min=0.1)
    train = SpikeTrain.from_dense(x)
    assert torch.equal(train.to_dense(), x)
    assert train.dtype == dtype
    assert train.shape == x.shape
    assert train.events == int((x != 0).sum())
    for a, b in zip(events_from_dense(x), (train.indptr, train.indices, train.values), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_other_sparse_forms_round_trip():
    x = spikes(7, 3, 11) * 2.0
    train = SpikeTrain.from_dense(x)
    csr = train.to_sparse_csr()
    assert csr.shape == (21, 11)
    assert torch.equal(csr.to_dense()[1 * 7 + 4], x[4, 1])  # row b * T + t
    assert torch.equal(SpikeTrain.from_sparse_csr(csr, batch_size=3).to_dense(), x)
    assert torch.equal(as_spike_train(csr, batch_size=3).to_dense(), x)
    assert torch.equal(as_spike_train(x.to_sparse()).to_dense(), x)
    assert as_spike_train(train) is train


def test_batched_csr():
    x = torch.zeros(4, 2, 6)
    x[:, :, 3] = 1  # batched CSR wants the same number of entries in every matrix
    assert torch.equal(as_spike_train(x.to_sparse_csr()).to_dense(), x)


def test_coo_keeps_order_of_columns_and_drops_stored_zeros():
    indices = torch.tensor([[0, 0, 1], [0, 0, 0], [4, 1, 2]])
    train = as_spike_train(torch.sparse_coo_tensor(indices, torch.tensor([1.0, 1.0, 0.0]), (2, 1, 5)))
    assert train.indices.tolist() == [1, 4]
    assert train.indptr.tolist() == [0, 2, 2]


def test_torch_sparse_round_trip():
    pytest.importorskip("torch_sparse", reason="torch_sparse is not installed")
    x = spikes(7, 3, 11)
    matrix = SpikeTrain.from_dense(x).to_torch_sparse()
    assert torch.equal(as_spike_train(matrix, batch_size=3).to_dense(), x)


def test_torch_sparse_missing_says_what_to_install():
    try:
        import torch_sparse  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"torch-scatter torch-sparse"):
            SpikeTrain.from_dense(spikes(2, 2, 2)).to_torch_sparse()
    else:
        pytest.skip("torch_sparse is installed")


def test_views_share_events():
    train = SpikeTrain.from_dense(spikes(4, 2, 3, 5))
    flat = train.flatten()
    assert flat.shape == (4, 2, 15)
    assert flat.indices is train.indices
    assert train.view(5, -1).shape == (4, 2, 5, 3)
    assert torch.equal(flat.to_dense(), train.to_dense().flatten(2))


def test_non_contiguous_and_expanded_inputs():
    x = spikes(3, 5, 20).transpose(0, 1)
    assert torch.equal(SpikeTrain.from_dense(x).to_dense(), x)
    still = spikes(1, 5, 20).expand(6, -1, -1)
    assert torch.equal(SpikeTrain.from_dense(still).to_dense(), still)


def test_gradient_reaches_active_entries_only():
    active = Active(torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32))
    carrier = torch.zeros(3, requires_grad=True)
    train = SpikeTrain(
        torch.tensor([0, 1, 1], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        (1, 2, 3),
        carrier=carrier,
        active=active,
    )
    weight = torch.arange(6.0).view(1, 2, 3)
    (train.to_dense() * weight).sum().backward()
    assert carrier.grad.tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("graded", [False, True])
def test_one_step(graded):
    x = spikes(6, 3, 4, 5, p=0.4) * (2.5 if graded else 1)
    train = SpikeTrain.from_dense(x)
    for t in (0, 3, -1):
        assert torch.equal(train.step(t), x[t])
    with pytest.raises(IndexError):
        train.step(6)


@pytest.mark.parametrize("listed", [True, False], ids=["active", "dense"])
def test_the_gradient_of_one_step_is_that_of_the_dense_form(listed):
    x = spikes(6, 3, 7, p=0.4)
    train = SpikeTrain.from_dense(x)
    near = SpikeTrain.from_dense(spikes(6, 3, 7, p=0.5))
    train.active = Active(near.indptr, near.indices) if listed else None
    train.carrier = torch.zeros(near.events if listed else (6, 3, 7), requires_grad=True)
    upstream = torch.randn(3, 7)
    found = [
        torch.autograd.grad((step * upstream).sum(), train.carrier)[0]
        for step in (train.step(4), train.to_dense()[4])
    ]
    assert found[1].norm() > 0
    assert torch.equal(*found)


def test_minus_zero_is_no_spike():
    assert SpikeTrain.from_dense(torch.full((2, 2, 20), -0.0)).events == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [3, 17])
def test_non_finite_input_raises(bad, column):
    x = torch.zeros(2, 2, 18)
    x[1, 0, column] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        SpikeTrain.from_dense(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpikeTrain.from_dense(torch.ones(3, 4)), r"\(T, B, N...\)"),
        (lambda: SpikeTrain.from_dense(torch.ones(3, 4, 5, dtype=torch.int64)), "floating dtype"),
        (lambda: SpikeTrain.from_dense(torch.full((3, 4, 5), 0.5), binary=True), "must be 0 or 1, found 0.5"),
        (lambda: as_spike_train(torch.eye(6).to_sparse_csr()), "batch_size"),
        (lambda: as_spike_train(torch.eye(6).to_sparse_csr(), batch_size=4), "do not divide"),
        (lambda: as_spike_train(np.zeros((2, 2, 2))), "got ndarray"),
        (lambda: as_spike_train(torch.eye(6).to_sparse()), r"COO tensor \(T, B, N...\)"),
        (lambda: SpikeTrain(torch.zeros(3), torch.zeros(0), (1, 2, 3)), "must be int32"),
        (
            lambda: SpikeTrain(
                torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), (1, 2, 3)
            ),
            r"B \* T \+ 1 = 3",
        ),
    ],
    ids=[
        "2d",
        "integer",
        "not-binary",
        "csr-without-batch",
        "csr-batch",
        "numpy",
        "coo-2d",
        "dtype",
        "indptr",
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1], [5000], "lie in 0…2, found 5000"),
        ([0, 1], [-1], "found -1"),
        ([0, 1000], [1], "number of events, 1; it goes from 0 to 1000"),
        ([1, 1], [1], "must rise from 0"),
        ([0, 2], [1, 1], "at most once"),
        ([0, 2], [2, 1], "increase within a row"),
    ],
)
def test_indices_that_would_leave_the_weights_are_refused(indptr, indices, message):
    with pytest.raises(InputError, match=message):
        SpikeTrain(
            torch.tensor(indptr, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32), (1, 1, 3)
        )


def test_a_dense_input_keeps_its_gradient_and_a_sparse_one_must_be_detached():
    x = spikes(6, 3, 7, p=0.3).requires_grad_()
    weight = torch.randn(4, 7)
    train = SpikeTrain.from_dense(x)
    found = []
    for form in (train, x):
        out = spiking_layer(form, weight, params=NeuronParams(0.9), backprop_threshold=None, return_mem=True)
        found.append(torch.autograd.grad(out.mem.square().sum(), x)[0])
    assert found[0].norm() > 0
    assert relative(*found) < 1e-5
    with pytest.raises(InputError, match="passes no gradient"):
        as_spike_train(x.detach().to_sparse().requires_grad_())


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda x: x.to_sparse_csr()], ids=["coo", "csr"])
def test_sparse_inputs_are_checked_as_dense_ones(make):
    x = torch.zeros(3, 2, 4)
    x[..., 1] = 1
    x[1, 1, 1] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        as_spike_train(make(x))


def test_layouts_that_are_not_taken_are_named():
    with pytest.raises(InputError, match="sparse_csc"):
        as_spike_train(torch.eye(4).to_sparse_csc())
    with pytest.raises(InputError, match="dense tensor, got torch.sparse_coo"):
        SpikeTrain.from_dense(torch.zeros(2, 2, 2).to_sparse())


def test_a_train_with_a_gradient_does_not_move():
    train = SpikeTrain.from_dense(spikes(2, 2, 3))
    train.carrier = torch.zeros(2, 2, 3, requires_grad=True)
    with pytest.raises(InputError, match="detach"):
        train.to("meta")
    assert not train.detach().requires_grad
    assert "density" in repr(train)


@pytest.mark.parametrize("shape", [(7, 3, 5), (4, 2, 2, 3), (1, 1, 1), (0, 2, 3), (3, 0, 4)])
def test_counts_are_the_sum_over_steps(shape):
    x = (torch.rand(shape) < 0.4).float()
    train = SpikeTrain.from_dense(x)
    assert torch.equal(train.counts(), x.sum(0))
    dense = x.clone().requires_grad_()
    train = SpikeTrain.from_dense(dense)
    grad = torch.randn(shape[1:])
    train.counts().backward(grad)
    assert torch.equal(dense.grad, grad.expand(shape))
    graded = SpikeTrain.from_dense(2 * x)
    assert torch.equal(graded.counts(), 2 * x.sum(0))
    half = SpikeTrain.from_dense(x.half())  # by torch, as on a GPU
    assert half.counts().dtype == torch.float16
    assert torch.equal(half.counts(), x.sum(0).half())


@pytest.mark.parametrize("window", [0.3, None])
def test_counts_pass_a_gradient_where_the_layer_is_active(window):
    x, w = (torch.rand(20, 4, 10) < 0.2).float(), torch.randn(6, 10)
    grad = torch.randn(4, 6)
    found = []
    for count in (lambda s: s.counts(), lambda s: s.to_dense().sum(0)):
        weight = w.clone().requires_grad_()
        out = spiking_layer(
            x,
            weight,
            params=NeuronParams(mem=0.9),
            events=True,
            backprop_threshold=window,
            min_active=0,
        )
        assert (out.spikes.active is None) == (window is None)
        (count(out.spikes) * grad).sum().backward()
        found.append(weight.grad)
    assert found[0].norm() > 0
    assert torch.equal(*found)


def test_counts_without_compiled_kernels_have_the_same_gradient(monkeypatch):
    x = (torch.rand(20, 4, 10) < 0.2).float()
    grads = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(SpikeTrain, "_kernels", lambda self: None)
        w = torch.ones(6, 10, requires_grad=True)
        out = spiking_layer(
            x, w, params=NeuronParams(mem=0.9), events=True, backprop_threshold=0.5, min_active=0
        )
        out.spikes.counts().square().sum().backward()
        grads.append(w.grad)
    assert grads[0].norm() > 0
    assert torch.equal(*grads)
