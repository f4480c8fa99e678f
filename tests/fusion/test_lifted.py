"""Norse's Lift over several modules: each runs over all steps, and all sees what upstream shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.backends.cpu import CPUBackend
from snn_sparse_plugin.core.backend import calls
from snn_sparse_plugin.fusion import opened

norse = pytest.importorskip("norse.torch")

T, B, SIZE = 6, 3, 10


@pytest.fixture(autouse=True)
def _events_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUBackend, "prefers_events", lambda *a, **k: True)
    torch.manual_seed(0)
    calls.clear()


def convolutions() -> int:
    """How many convolutions ran over events."""
    return calls["cpu", "convolution"]


def neurons() -> int:
    return calls["cpu", "forward"]


def frames(*size: int) -> Tensor:
    return (torch.rand(T, B, *(size or (2, SIZE, SIZE))) < 0.25).float()


def lift(*modules: nn.Module) -> nn.Module:
    return norse.Lift(nn.Sequential(*modules))  # type: ignore[no-any-return]


def lif(v_th: float = 0.25) -> nn.Module:
    return norse.LIF(norse.LIFParameters(v_th=torch.tensor(v_th)))  # type: ignore[no-any-return]


def gridded(net: nn.Module) -> nn.Module:
    """Weights on a binary grid, so that every order of summation gives the same float; statistics that are not 0, 1."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() > 1:
                parameter.copy_((torch.randn(parameter.shape) * 64).round() / 128)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.normal_()  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.2, 2)  # type: ignore[union-attr, operator]
    return net


def sequence(*first: nn.Module, features: int = 80) -> nn.Module:
    """``first`` inside a Lift, then a neuron, and a linear readout inside another."""
    return gridded(
        norse.SequentialState(
            lift(nn.Conv2d(2, 5, 3, bias=False), *first),
            lif(),
            lift(nn.Flatten(), nn.Linear(features, 4)),
            norse.LI(),
        )
    )


class Outcome:
    """What a training step of a network leaves: output, states, gradients and buffers."""

    def __init__(self, net: nn.Module, run: Callable[[], tuple[Tensor, Any]]) -> None:
        torch.manual_seed(7)
        net.zero_grad()
        self.out, self.state = run()
        self.out.square().mean().backward()  # type: ignore[no-untyped-call]
        self.grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        self.buffers = [b.clone() for b in net.buffers()]
        self.random = torch.rand(3)  # what is drawn next


def both(net: nn.Module, x: Tensor, *, exact: bool = True, **options: Any) -> tuple[Outcome, Outcome]:
    """Upstream's and ours, of copies, which have to be equal."""
    theirs, ours = copy.deepcopy(net), copy.deepcopy(net)

    def sparse() -> tuple[Tensor, Any]:
        with ssp.sparse_mode(backprop_threshold=None, **options):
            return ours(x)  # type: ignore[no-any-return]

    expected = Outcome(theirs, lambda: theirs(x))
    calls.clear()
    found = Outcome(ours, sparse)
    agree(found, expected, exact=exact)
    return expected, found


def agree(found: Outcome, expected: Outcome, *, exact: bool = True) -> None:
    assert expected.out.abs().sum() > 0
    if exact:
        assert torch.equal(found.out, expected.out)
    else:
        assert relative(found.out, expected.out) < 1e-5
    assert [type(s) for s in found.state] == [type(s) for s in expected.state]
    for got, want in zip(found.grads, expected.grads, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7
    for got, want in zip(found.buffers, expected.buffers, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.random, expected.random)


class Scale(nn.Module):
    """A module of the user's own, about which nothing is known."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def shared_norm() -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm2d(5)
    return norm, nn.MaxPool2d(2), norm


def pool() -> nn.Module:
    return nn.MaxPool2d(2)


INSIDE: dict[str, tuple[Callable[[], tuple[nn.Module, ...]], int]] = {
    # behind a convolution, and how many layers of the Lift run over events or once
    "pool": (lambda: (pool(),), 1),
    "average_pool": (lambda: (nn.AvgPool2d(2),), 1),
    "batch_norm": (lambda: (nn.BatchNorm2d(5).eval(), pool()), 1),
    "batch_norm_in_training": (lambda: (nn.BatchNorm2d(5), pool()), 1),
    "batch_norm_in_training_without_statistics": (
        lambda: (nn.BatchNorm2d(5, track_running_stats=False), pool()),
        1,
    ),
    "mean_of_all_steps": (lambda: (nn.BatchNorm2d(5, momentum=None), pool()), 1),
    "two_batch_norms_in_training": (
        lambda: (nn.BatchNorm2d(5), pool(), nn.Conv2d(5, 5, 1, bias=False), nn.BatchNorm2d(5)),
        2,
    ),
    "dropout": (lambda: (pool(), nn.Dropout(0.4)), 1),
    "dropout_in_place": (lambda: (pool(), nn.Dropout(0.4, inplace=True)), 1),
    "dropout_of_maps": (lambda: (nn.Dropout2d(0.4), pool()), 1),
    "batch_norm_in_training_and_others": (
        lambda: (
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            pool(),
            nn.Dropout(0.4, inplace=True),
            nn.Conv2d(5, 5, 1),
        ),
        2,
    ),
    "dropout_in_eval": (lambda: (pool(), nn.Dropout(0.4).eval()), 1),
    "activation": (lambda: (pool(), nn.ReLU(inplace=True)), 1),
    "nested": (lambda: (nn.Sequential(nn.BatchNorm2d(5).eval(), nn.Sequential(pool())), nn.Identity()), 1),
    # whose order shows
    "two_dropouts": (lambda: (nn.Dropout(0.4), pool(), nn.Dropout(0.2)), 0),
    "a_batch_norm_twice": (shared_norm, 0),
    "unknown": (lambda: (pool(), Scale()), 0),
    "other_noise": (lambda: (pool(), nn.RReLU()), 0),
}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", INSIDE)
def test_what_stands_inside(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "LARGE", 0 if large else float("inf"))
    inside, events = INSIDE[name]
    net, x = sequence(*inside()), frames()
    training = any(isinstance(m, nn.BatchNorm2d) and m.training for m in net.modules())
    both(net, x, exact=not training)
    assert convolutions() == events
    assert neurons() == 2


@pytest.mark.parametrize("noise", [nn.Dropout, nn.RReLU])
def test_lifts_draw_their_numbers_one_after_the_other(
    noise: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "LARGE", 0)
    net = norse.SequentialState(
        *(norse.Lift(nn.Conv2d(2, 5, 3)), norse.Lift(nn.Dropout(0.4)), lift(pool(), noise()), lif()),
        *(lift(nn.Flatten(), nn.Linear(80, 4)), norse.LI()),
    )
    both(gridded(net), frames())
    assert convolutions() == 1


def test_a_whole_network() -> None:
    net = gridded(
        norse.SequentialState(
            *(lift(nn.Conv2d(2, 5, 3), pool()), lif()),
            *(lift(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6).eval(), nn.ReLU()), lif()),
            *(norse.Lift(nn.Flatten()), norse.Lift(nn.Linear(24, 4)), lif()),
            *(lift(nn.Sequential(nn.Linear(4, 4))), norse.LI()),
        )
    )
    both(net, frames())
    assert (convolutions(), neurons()) == (2, 4)


@pytest.mark.parametrize("flatten", [norse.Lift(nn.Flatten()), lift(nn.Flatten()), nn.Flatten(2)])
def test_spikes_stay_events_on_their_way(flatten: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    net = norse.SequentialState(
        lift(nn.Conv2d(2, 5, 3), pool()), lif(), flatten, lift(nn.Linear(80, 4)), norse.LI()
    )
    monkeypatch.setattr(ssp.SpikeTrain, "to_dense", lambda _: pytest.fail("made dense"))
    with ssp.sparse_mode():
        gridded(net)(frames())


def test_a_sequential_that_takes_all_steps() -> None:
    net = gridded(
        norse.SequentialState(
            *(norse.Lift(nn.Conv2d(2, 5, 3)), lif()),
            *(nn.Sequential(nn.Flatten(2), nn.Linear(320, 4)), lif()),
            *(nn.Sequential(nn.Linear(4, 4), Scale()), norse.LI()),
        )
    )
    both(net, frames())
    assert (convolutions(), neurons()) == (1, 3)


@pytest.mark.parametrize(
    "place", ["0", "0.lifted_module", "0.lifted_module.0", "0.lifted_module.1", "2.lifted_module"]
)
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_are_called_as_upstream_calls_them(place: str, kind: str) -> None:
    net, x = sequence(pool()), frames().requires_grad_()
    seen: list[torch.Size] = []
    hooked = net.get_submodule(place)
    getattr(hooked, f"register_{kind}")(lambda module, given, *_: seen.append(given[0].shape))
    both(net, x)  # of copies, whose hooks are the same
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert len(seen) == 2 * (1 if place == "0" else T)


@pytest.mark.parametrize("before", [nn.Identity, nn.Sigmoid])
def test_a_module_over_all_steps_writes_into_its_input(before: type[nn.Module]) -> None:
    net = gridded(
        norse.SequentialState(
            *(lift(nn.Conv2d(2, 5, 3), before()), nn.ReLU(inplace=True), lif()),
            *(lift(nn.Flatten(), nn.Linear(320, 4)), norse.LI()),
        )
    )
    both(net, frames(), exact=before is nn.Identity)
    assert convolutions() == 1


def test_hooks_of_several_layers_take_turns() -> None:
    net, x = sequence(pool(), nn.Identity()), frames()
    seen: list[str] = []
    for key in ("0", "2"):
        net[0].lifted_module[int(key)].register_forward_hook(lambda *_, key=key: seen.append(key))  # type: ignore
    with ssp.sparse_mode():
        net(x)
    assert seen == ["0", "2"] * T


def test_a_forward_of_the_instance_is_called() -> None:
    net, x = sequence(pool()), frames()
    for module in (net[0], net[0].lifted_module, net[2].lifted_module[1]):  # type: ignore[index, union-attr]
        upstream, found = module.forward, []
        module.forward = lambda x, upstream=upstream, found=found: found.append(1) or upstream(x)
        with ssp.sparse_mode():
            net(x)
        assert found
        del module.forward


def test_states_have_upstreams_places() -> None:
    net, x = sequence(pool(), nn.Dropout(0.5).eval()), frames()
    expected, _ = net(x)
    with ssp.sparse_mode():
        first, state = net(x[:4])
        second, state = net(x[4:], state)
    assert torch.equal(torch.cat([first, second]), expected)
    assert [s is None for s in state] == [True, False, True, False]
    out = ssp.unroll(net, x)
    assert torch.equal(out.spikes, expected)
    assert len(out.state) == 4
    again = ssp.unroll(net, x, out.state)
    assert not torch.equal(again.spikes, expected)


def test_a_lift_of_a_cell_hands_its_state_to_the_next_lift() -> None:
    cell = norse.Lift(norse.LIFCell(norse.LIFParameters(v_th=torch.tensor(0.25))))
    net = gridded(
        norse.SequentialState(
            lift(nn.Conv2d(2, 5, 3), pool()), cell, lift(nn.Flatten(), nn.Linear(80, 4)), norse.LI()
        )
    )
    both(net, frames())
    assert neurons() > 0
    with pytest.raises(ssp.InputError, match="hands its state on"):
        ssp.unroll(net, frames())


def test_unroll_of_events_and_of_lengths() -> None:
    net, x = sequence(pool()), frames()
    expected, _ = net(x)
    calls.clear()
    assert torch.equal(ssp.unroll(net, ssp.SpikeTrain.from_dense(x)).spikes, expected)
    assert convolutions() == 1
    lengths = [T, 2, 4]
    found = ssp.unroll(net, x, lengths=lengths)
    for sample, steps in enumerate(lengths):
        torch.testing.assert_close(found.spikes[:steps, sample], expected[:steps, sample])
        assert not found.spikes[steps:, sample].any()
    with pytest.raises(ssp.InputError, match="several samples"):
        ssp.unroll(sequence(nn.BatchNorm2d(5), pool()), x, lengths=lengths)


def test_without_time_fusion_it_is_upstreams() -> None:
    net, x = sequence(pool()), frames()
    both(net, x, fuse_time=False)
    assert torch.equal(ssp.unroll(net, x, fuse_time=False).spikes, net(x)[0])
    assert convolutions() == neurons() == 0


@pytest.mark.parametrize("window", [None, 0.25])
def test_within_the_window(window: float | None) -> None:
    net, x = sequence(pool()), frames()
    options = {"backprop_threshold": window, "min_active": 0}

    def run(**more: Any) -> Outcome:
        def steps() -> tuple[Tensor, Any]:
            with ssp.sparse_mode(**options, **more):
                return net(x)  # type: ignore[no-any-return]

        return Outcome(net, steps)

    expected = run(fuse_time=False)
    agree(run(), expected)
    assert convolutions() == 1


def test_the_import_swap() -> None:
    import snn_sparse_plugin.norse as face

    net, x = sequence(nn.BatchNorm2d(5).eval(), pool()), frames()
    twin = face.SequentialState(
        *(face.Lift(copy.deepcopy(net[0].lifted_module)), face.LIF(net[1].p)),  # type: ignore[index, union-attr]
        *(face.Lift(copy.deepcopy(net[2].lifted_module)), face.LI()),  # type: ignore[index, union-attr]
    )
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(twin(x)[0], net(x)[0])
    assert convolutions() == 1


def test_sparsify_and_its_report() -> None:
    net, x = sequence(pool()), frames()
    expected, keys = net(x)[0], list(net.state_dict())
    report = ssp.sparsify(net)
    assert torch.equal(net(x)[0], expected)
    assert report.names("fused") == ["1", "3"]
    assert report.runs()["1"]["fused"] == 1
    assert convolutions() == 1
    assert list(net.state_dict()) == keys


def test_an_error_names_the_layer() -> None:
    net = sequence(pool(), features=79)
    with ssp.sparse_mode(), pytest.raises(ssp.InputError, match=r"2\.lifted_module\.1→3: .* 80.* 79"):
        net(frames())


def test_samples_without_a_batch() -> None:
    net, x = sequence(pool()), frames()[:, 0]
    net[2] = norse.Lift(nn.Sequential(nn.Flatten(0), net[2].lifted_module[1]))  # type: ignore[index, union-attr, operator]
    expected, _ = net(x)
    with ssp.sparse_mode():
        found, _ = net(x)
    assert torch.equal(found, expected)


def test_an_image_at_every_step_is_convolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = sequence(pool()), frames()[:1].expand(T, -1, -1, -1, -1)
    seen = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *a, **k: seen.append(x.shape) or convolve(x, *a, **k)
    )
    both(net, x)
    assert seen == [x.shape[1:]] * (T + 1)
