"""What makes it fast, checked without a clock: which path ran, what was saved, the guard, threads and fork."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import on_grid, relative, spikes

from snn_sparse_plugin import NeuronParams, SpikeTrain, Surrogate
from snn_sparse_plugin.backends.cpu import layout, threads
from snn_sparse_plugin.core.csr import events_from_dense
from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.core.errors import InputError, NonFiniteError
from snn_sparse_plugin.ops import spiking_layer
from snn_sparse_plugin.ops.spiking_layer.products import events_or_product

FAST = Surrogate("fast_sigmoid", (100.0,))


def saved_bytes(run):
    """Bytes kept for backward by ``run()``, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = run()
    del kept
    return sum(storages.values())


@pytest.mark.parametrize(("threshold", "limit"), [("auto", 1.0), (None, 2.0)], ids=["masked", "exact"])
def test_bytes_saved_per_neuron_step(threshold, limit):
    T, B, N = 128, 16, 100
    train = SpikeTrain.from_dense(spikes(T, B, N, p=0.03))
    weight = (torch.randn(N, N) * 0.3).requires_grad_()

    def run():
        return spiking_layer(
            train, weight, params=NeuronParams(0.9), surrogate=FAST, backprop_threshold=threshold, events=True
        )

    out = run()
    assert 0.005 < out.spikes.density < 0.1
    constant = weight.numel() * 4 + train.indices.numel() * 4 + train.indptr.numel() * 4
    assert (saved_bytes(run) - constant) / (T * B * N) < limit


def test_the_input_current_is_not_kept_where_nothing_replays():
    T, B, N = 128, 16, 100
    current = torch.randn(T, B, N).mul_(0.3).requires_grad_()

    def run():
        # a product of the current, so that it is no leaf that lives anyway
        return spiking_layer(current * 1.0, params=NeuronParams(0.9), surrogate=FAST, events=True)

    assert saved_bytes(run) / (T * B * N) < 1.0
    upstream = torch.randn(T, B, N)
    found = []
    for backend in ("cpu", "reference"):
        out = spiking_layer(current, params=NeuronParams(0.9), surrogate=FAST, backend=backend)
        found.append(torch.autograd.grad((out.spikes * upstream).sum(), current)[0])
    assert relative(*found) < 1e-5


def test_a_silent_layer_learns_through_the_guard_and_not_without(counted):
    x, upstream = spikes(30, 4, 20), torch.randn(30, 4, 6)
    weight = (on_grid(6, 20, scale=0.02)).requires_grad_()  # far below threshold: nothing is near it

    def gradient(**options):
        out = spiking_layer(x, weight, params=NeuronParams(0.9), surrogate=FAST, **options)
        assert out.spikes.sum() == 0
        return torch.autograd.grad((out.spikes * upstream).sum(), weight)[0]

    exact = gradient(backprop_threshold=None)
    guarded = gradient(backprop_threshold=0.2)
    cut = gradient(backprop_threshold=0.2, min_active=0)
    assert exact.norm() > 0
    assert relative(guarded, exact) < 1e-6
    assert cut.norm() == 0
    assert counted["guard", "spiking_layer"] == 1


def test_dense_inputs_take_the_product_and_sparse_ones_events():
    weight = on_grid(5, 40)
    for x, sparse in [
        (spikes(10, 8, 40, p=0.02), True),
        (spikes(10, 8, 40, p=0.6), False),
        (torch.rand(10, 8, 40), False),
        (spikes(1, 8, 40, p=0.02).expand(10, -1, -1), False),
        (spikes(10, 8, 40, p=0.02).requires_grad_(), False),
    ]:
        train, current = events_or_product(x, weight, None)
        assert (train is not None) == sparse
        assert (current is None) == sparse


@pytest.mark.parametrize("steps", [10, 700], ids=["every number", "a sample"])
def test_an_input_of_up_to_two_fifths_comes_as_events(steps):
    weight, x = on_grid(5, 50), torch.zeros(steps, 8, 50)
    for nonzeros, sparse in [(0, True), (19, True), (21, False)]:
        x[..., :nonzeros] = 0.5
        train, current = events_or_product(x, weight, None)
        assert (train is not None) == sparse
        if train is not None:
            assert torch.equal(train.to_dense(), x)
        else:
            assert torch.equal(current, torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("graded", [False, True])
def test_events_of_a_small_input_are_those_of_its_samples_in_turn(graded):
    x = spikes(13, 6, 70, p=0.3) * (
        torch.rand(13, 6, 70) if graded else 1.0
    )  # finds more than it has room for
    train, _ = events_or_product(x, on_grid(5, 70), None)
    expected = events_from_dense(x)
    for found, other in zip((train.indptr, train.indices, train.values), expected, strict=True):
        assert other is None if found is None else torch.equal(found, other)


def test_a_small_input_that_is_not_finite_says_so():
    x = spikes(10, 8, 40, p=0.02)
    x[3, 2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        events_or_product(x, on_grid(5, 40), None)


def test_few_rows_of_a_large_weight_take_the_product():
    large = torch.zeros(512, 1024)
    for x, weight, sparse in [
        (spikes(10, 8, 1024, p=0.02), large, False),
        (spikes(20, 8, 1024, p=0.02), large, True),
        (spikes(20, 8, 1024, p=0.02), torch.zeros(1024, 1024), False),
        (spikes(10, 8, 1024, p=0.02), large[:200], True),
    ]:
        assert (events_or_product(x, weight, None)[0] is not None) == sparse


def test_a_constant_input_is_multiplied_once():
    weight = on_grid(5, 40).requires_grad_()
    image = torch.rand(1, 8, 40)
    _, current = events_or_product(image.expand(25, -1, -1), weight, None)
    assert current.stride(0) == 0
    found, expected = [
        torch.autograd.grad(
            spiking_layer(
                x, weight, params=NeuronParams(0.9), backprop_threshold=None, return_mem=True
            ).mem.sum(),
            weight,
        )[0]
        for x in (image.expand(25, -1, -1), image.repeat(25, 1, 1))
    ]
    assert relative(found, expected) < 1e-5


def test_graded_spikes_multiply_the_weights(counted):
    x = spikes(30, 4, 20) * torch.randint(1, 5, (30, 4, 20)) / 4
    weight = on_grid(6, 20, scale=0.5).requires_grad_()
    found = []
    for backend in ("reference", "cpu"):
        out = spiking_layer(SpikeTrain.from_dense(x), weight, params=NeuronParams(0.875), backend=backend)
        found.append((out.spikes, torch.autograd.grad(out.spikes.sum(), weight)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[1][1], found[0][1]) < 1e-5


def test_input_gradient_of_a_dense_input():
    weight, spec_input, upstream = on_grid(6, 20, scale=0.5), spikes(30, 4, 20), torch.randn(30, 4, 6)
    grads = []
    for backend in ("reference", "cpu"):
        x = spec_input.clone().requires_grad_()
        out = spiking_layer(x, weight, params=NeuronParams(0.875), backend=backend)
        grads.append(torch.autograd.grad((out.spikes * upstream).sum(), x)[0])
    assert grads[0].shape == (30, 4, 20)
    assert grads[0].norm() > 0
    assert relative(grads[1], grads[0]) < 1e-5


def _train_once(results, k):
    weight = on_grid(9, 20, scale=0.5).requires_grad_()
    out = spiking_layer(X, weight, params=NeuronParams(0.9), surrogate=FAST, backend="cpu")
    out.spikes.sum().backward()
    results[k] = out.spikes.sum().item()


X = (torch.rand(50, 8, 20, generator=torch.Generator().manual_seed(1)) < 0.1).float()


def test_many_python_threads_at_once():
    results = [None] * 8
    workers = [threading.Thread(target=_train_once, args=(results, k)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert None not in results


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    _train_once([None], 0)  # threads exist in the parent
    pid = os.fork()
    if pid == 0:
        done = [None]
        worker = threading.Thread(target=_train_once, args=(done, 0), daemon=True)
        worker.start()
        worker.join(60)
        os._exit(0 if done[0] is not None else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_parallel_runs_every_task_in_order_and_raises(tasks):
    assert threads.parallel([lambda k=k: k * k for k in range(tasks)]) == [k * k for k in range(tasks)]

    def fail():
        raise ValueError("from a task")

    with pytest.raises(ValueError, match="from a task"):
        threads.parallel([fail, *[lambda: 1] * (tasks - 1)])


def test_the_caller_does_the_work_when_no_thread_is_free(monkeypatch):
    monkeypatch.setattr(threads, "_ensure_workers", lambda wanted: None)
    monkeypatch.setattr(threads, "_jobs", threads.queue.SimpleQueue())
    assert threads.parallel([lambda k=k: k for k in range(4)]) == [0, 1, 2, 3]


def test_ranges_cover_everything_once():
    for n in (0, 1, 2, 7):
        for parts in (1, 2, 5):
            for ahead in (0, 1, 100):
                ranges = threads.split(n, parts, ahead)
                assert len(ranges) == max(1, min(n, parts))
                assert [k for first, last in ranges for k in range(first, last)] == list(range(n))


@pytest.mark.parametrize(
    ("T", "B", "N", "shared"), [(100, 64, 20, True), (10, 8, 200, False), (500, 1, 200, False)]
)
def test_what_takes_longer_than_to_wake_a_thread_is_shared_out(monkeypatch, T, B, N, shared):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ranges = layout.ranges_of([SimpleNamespace(T=T, B=B, N=N)])
    assert len(ranges) == 1 + shared
    assert [k for first, last in ranges for k in range(first, last)] == list(range(B))
    assert len(layout.ranges_of([SimpleNamespace(T=T, B=B, N=N)] * 9, [9.0] * 9)) == min(B, 2)


def test_the_calling_thread_has_more_as_others_begin_later():
    assert threads.split(20, 2) == [(0, 10), (10, 20)]
    assert threads.split(20, 2, ahead=4) == [(0, 12), (12, 20)]
    assert threads.split(20, 4, ahead=8) == [(0, 11), (11, 14), (14, 17), (17, 20)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("given", ["weight", "current"])
def test_one_input_for_all_steps_has_one_gradient(backend, given):
    weight = on_grid(50, 9).requires_grad_()
    image, grad = torch.rand(1, 4, 9), torch.randn(12, 4, 50)
    found = []
    for x, steps in ((image, 12), (image.repeat(12, 1, 1), None)):
        x = x.clone().requires_grad_()
        current = (x, weight) if given == "weight" else (x @ weight.t(),)
        out = spiking_layer(
            *current, params=NeuronParams(0.875), steps=steps, backprop_threshold=None, backend=backend
        )
        g_weight, g_x = torch.autograd.grad(out.spikes, (weight, x), grad)
        found.append((out.spikes, g_weight, g_x.sum(0)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(relative(a, b) < 1e-5 for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_steps_want_an_input_of_one_step():
    with pytest.raises(InputError, match="steps=3"):
        spiking_layer(torch.rand(2, 4, 9), params=NeuronParams(0.875), steps=3)


@pytest.mark.parametrize("T", [25, 70])
@pytest.mark.parametrize("spec", [NeuronSpec(), NeuronSpec(synapse=True), NeuronSpec(reset="none")])
def test_a_linear_adjoint_replays_into_its_block(T, spec):
    weight, x = on_grid(130, 20), spikes(T, 5, 20, p=0.3)
    grads = [torch.randn(T, 5, 130), torch.randn(T, 5, 130), torch.randn(5, 130)]
    found = []
    for backend in ("cpu", "reference"):
        w = weight.clone().requires_grad_()
        out = spiking_layer(
            *(SpikeTrain.from_dense(x), w),
            spec=spec,
            params=NeuronParams(0.875, 0.5),
            return_mem=True,
            backprop_threshold=None,
            backend=backend,
        )
        found.append((out.spikes, torch.autograd.grad((out.spikes, out.mem, out.state.v), w, grads)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[0][1], found[1][1]) < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("threshold", [None, 0.05], ids=["exact", "window"])
def test_an_expanded_current_with_a_gradient_has_one_at_every_step(backend, threshold):
    """Of a convolution, for instance, that ran once for all steps."""
    upstream, current, found = torch.rand(12, 3, 17), on_grid(3, 17, scale=0.5), []
    options = {"params": NeuronParams(0.875), "backprop_threshold": threshold, "min_active": 0}
    for every in (lambda x: x.expand(12, -1, -1), lambda x: x.repeat(12, 1, 1)):
        leaf = current.clone().requires_grad_()
        currents = every(leaf)
        spikes_out = spiking_layer(currents, backend=backend, **options).spikes
        found.append(torch.autograd.grad(spikes_out, (currents, leaf), upstream))
    assert found[0][0].shape == (12, 3, 17)
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-6
