"""Copies, pickles, state dicts, dtypes and DataParallel of every class, and what the faces are."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from snntorch_cases import (
    CASES,
    B,
    N,
    assert_same,
    equal,
    every_class,
    every_way,
    face,
    observe,
    outcome,
    snntorch,
    spike_gradient,
    steps,
)
from torch import nn

from snn_sparse_plugin import restore, sparse_mode, sparsify  # isort: skip


@every_way
@every_class
class TestCopies:
    def test_deepcopy(self, case, way):
        theirs = observe(copy.deepcopy(case.hidden()), case)
        module = way.ready(case.hidden(way.library))
        twin = copy.deepcopy(module)
        assert type(twin) is type(module)
        assert twin not in snntorch.SpikingNeuron.instances  # upstream does not list copies
        with way.on():
            assert_same(observe(twin, case), theirs)

    def test_deepcopy_of_a_live_neuron(self, case, way):
        def run(module):
            steps(module, case, case.inputs())
            return copy.deepcopy(module)

        error, expected = outcome(lambda: run(case.hidden()))
        with way.on():
            failed, got = outcome(lambda: run(way.ready(case.hidden(way.library))))
        assert failed == error
        assert not error or got == expected

    def test_pickle(self, case, way):
        # upstream's default spike function is a closure; the faces write down how to build it again
        error, _ = outcome(lambda: pickle.dumps(case.hidden()))
        assert error == ("" if case.name == "LeakyParallel" else "AttributeError")
        failed, data = outcome(lambda: pickle.dumps(way.ready(case.hidden(way.library))))
        assert failed == ("" if way.library is face else error)
        if not failed:
            with way.on():
                assert_same(observe(pickle.loads(data), case), observe(case.hidden(), case))

    def test_pickle_with_a_disabled_surrogate(self, case, way):
        if not case.knows("surrogate_disable"):
            pytest.skip("takes no surrogate_disable")
        module = way.ready(case.hidden(way.library, surrogate_disable=True))
        twin = pickle.loads(pickle.dumps(module))
        with way.on():
            assert_same(observe(twin, case), observe(case.hidden(surrogate_disable=True), case))

    def test_state_dict_both_ways(self, case, way):
        ours, theirs = way.ready(case.hidden(way.library)), case.hidden()
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.125)  # on the grid, so that every order of summation gives the same float
        ours.load_state_dict(theirs.state_dict())
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        fresh = case.hidden()
        fresh.load_state_dict(torch.load(file))
        expected = observe(theirs, case)
        assert_same(observe(fresh, case), expected)
        with way.on():
            assert_same(observe(ours, case), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
    def test_dtype(self, case, way, dtype):
        def run(module):
            x = case.inputs().to(dtype).requires_grad_()
            leaves = torch.utils._pytree.tree_leaves(steps(module.to(dtype), case, x))
            (grad,) = torch.autograd.grad(sum(o.sum() for o in leaves), x)
            return [*leaves, grad]

        error, expected = outcome(lambda: run(case.hidden()))
        with way.on():
            failed, got = outcome(lambda: run(way.ready(case.hidden(way.library))))
        assert failed == error
        if error:
            assert got == expected
            return
        assert all(equal(a, b) for a, b in zip(got[:-1], expected[:-1], strict=True))
        tolerance = 1e-12 if dtype is torch.float64 else 1e-2
        assert got[-1].dtype == expected[-1].dtype
        assert (got[-1] - expected[-1]).norm() <= tolerance * expected[-1].norm()

    def test_data_parallel(self, case, way):
        theirs = observe(nn.DataParallel(case.hidden()), case)
        with way.on():
            ours = observe(nn.DataParallel(way.ready(case.hidden(way.library))), case)
        assert_same(ours, theirs)

    def test_no_grad(self, case, way):
        with torch.no_grad():
            expected = steps(case.hidden(), case, case.inputs())
            with way.on():
                got = steps(way.ready(case.hidden(way.library)), case, case.inputs())
        flatten = torch.utils._pytree.tree_leaves
        for a, b in zip(flatten(got), flatten(expected), strict=True):
            assert equal(a, b)
            assert not a.requires_grad


@every_class
class TestFaces:
    def test_is_upstreams_in_name_and_signature(self, case):
        ours, theirs = getattr(face, case.name), getattr(snntorch, case.name)
        assert issubclass(ours, theirs)
        assert (ours.__name__, ours.__qualname__) == (theirs.__name__, theirs.__qualname__)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert repr(case.build(face)) == repr(case.build())

    def test_inheritance_is_upstreams(self, case):
        for other in CASES:
            expected = issubclass(getattr(snntorch, case.name), getattr(snntorch, other))
            assert issubclass(getattr(face, case.name), getattr(face, other)) == expected

    def test_is_sparse_without_a_block(self, case):
        module = case.hidden(face)
        sparsify(module, backprop_threshold=1e-6, min_active=0)
        plain = case.hidden()
        assert not torch.equal(*(spike_gradient(m, case) for m in (module, plain)))
        restore(module)
        with sparse_mode(backprop_threshold=1e-6, min_active=0):
            masked = spike_gradient(case.hidden(face), case)
        assert (masked == 0).all()

    def test_the_options_of_a_block_reach_it(self, case):
        with sparse_mode(backprop_threshold=None):
            got = spike_gradient(case.hidden(face), case)
        assert torch.equal(got, spike_gradient(case.hidden(), case))


def test_associative_from_the_number_of_neurons():
    module = face.AssociativeLeaky.from_num_spiking_neurons(N, 9)
    assert type(module) is face.AssociativeLeaky
    assert module(torch.randn(5, B, N)).shape == (5, B, 9)


def test_building_a_neuron_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in CASES.values():
            case.hidden(face)
