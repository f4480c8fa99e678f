"""Spikes as bits, and trains that are made of them."""

import pytest
import torch

from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.core import bits
from snn_sparse_plugin.core.errors import InputError

SIZES = [1, 31, 32, 33, 100]


def dense(T, B, *features, p=0.4):
    return (torch.rand(T, B, *features, generator=torch.Generator().manual_seed(T + B)) < p).float()


def of_words(x, carrier=None):
    return SpikeTrain.from_words(bits.pack(x.flatten(2)), x.shape, dtype=x.dtype, carrier=carrier)


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize(("T", "B"), [(0, 2), (7, 0), (7, 3)])
def test_round_trip(T, B, N):
    x = dense(T, B, N)
    train = SpikeTrain.from_dense(x)
    words = bits.pack_events(train.indptr, train.indices, x.shape)
    assert words.dtype == torch.int32
    assert words.shape == (T, B, (N + 31) // 32)
    assert torch.equal(bits.pack(x), words)
    assert torch.equal(bits.unpack(words, N), x.int())
    assert int(bits.count(words)) == train.events
    indptr, indices = bits.unpack_events(words, N)
    assert torch.equal(indptr, train.indptr)
    assert torch.equal(indices, train.indices)


def test_every_bit_counts():
    words = torch.tensor([-1, -(2**31), 2**31 - 1, 0, 1], dtype=torch.int32)
    assert int(bits.count(words)) == 32 + 1 + 31 + 0 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 33), (5, 2, 3, 4, 5), (0, 2, 3), (3, 0, 2), (2, 2, 0)], ids=str)
def test_a_train_of_words_is_the_train_of_its_events(shape, dtype):
    x = dense(*shape).to(dtype)
    expected, got = SpikeTrain.from_dense(x), of_words(x)
    for train in (got, got.view(-1) if x.numel() else got, got.flatten(), got.detach(), got.to("cpu")):
        assert torch.equal(train.to_dense().flatten(2), x.flatten(2))
        assert torch.equal(train.counts().flatten(), x.sum(0).flatten())
        for t in range(shape[0]):
            assert torch.equal(train.step(t).flatten(1), x[t].flatten(1))
    assert "indptr" not in vars(got)  # nobody has asked
    assert got.events == expected.events
    assert got.density == expected.density
    assert repr(got) == repr(expected)
    assert torch.equal(got.indptr, expected.indptr)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(expected.words, got.words)


def test_what_was_made_of_events_is_shared_by_their_trains():
    train = of_words(dense(4, 2, 6))
    view = train.view(2, 3)
    assert view.indices is train.indices
    other = SpikeTrain.from_dense(dense(4, 2, 6))
    assert other.flatten().words is other.words


@pytest.mark.parametrize("form", ["to_dense", "counts", "step"])
def test_the_gradient_of_a_train_of_words_is_dense(form):
    x = dense(4, 2, 6)
    carrier = torch.zeros(4, 2, 6, requires_grad=True)
    leaf = x.clone().requires_grad_()
    read = {
        "to_dense": lambda s: s.to_dense() if isinstance(s, SpikeTrain) else s,
        "counts": lambda s: s.counts() if isinstance(s, SpikeTrain) else s.sum(0),
        "step": lambda s: s.step(1) if isinstance(s, SpikeTrain) else s[1],
    }[form]
    for source in (of_words(x, carrier).view(2, 3).flatten(), leaf):
        out = read(source)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    assert torch.equal(carrier.grad, leaf.grad)


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        (torch.zeros(2, 3, 1, dtype=torch.int64), (2, 3, 5)),
        (torch.zeros(2, 3, 1, dtype=torch.int32), (2, 3, 33)),
        (torch.zeros(2, 3, dtype=torch.int32), (2, 3)),
    ],
    ids=["dtype", "too few", "no neurons"],
)
def test_words_that_do_not_fit(words, shape):
    with pytest.raises(InputError, match="int32 of shape"):
        SpikeTrain.from_words(words, shape)


def test_a_number_that_somebody_may_write_unseen_is_read_again(monkeypatch):
    from snn_sparse_plugin.core import host
    from snn_sparse_plugin.core.unseen import note_alias

    monkeypatch.setattr(host, "HOSTS", frozenset())  # the CPU stands for a device
    x = torch.tensor(2.0)
    reads = []
    read = lambda t: reads.append(1) or float(t)  # noqa: E731
    assert [host.known(x, read) for _ in range(3)] == [2.0] * 3
    assert len(reads) == 1
    x.fill_(3)
    assert host.known(x, read) == 3
    alias = x.data
    note_alias(x, alias)
    alias.fill_(4)  # the version of x does not tell
    assert host.known(x, read) == 4
