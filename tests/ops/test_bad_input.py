"""Bad input to the op: a clear error that names what was expected, what came and where, or a correct empty result."""

import logging

import pytest
import torch
from helpers import on_grid, spikes

from snn_sparse_plugin import (
    ConfigError,
    InputError,
    NeuronParams,
    NeuronSpec,
    NeuronState,
    SpikeTrain,
    Surrogate,
    UnsupportedError,
)
from snn_sparse_plugin.ops import spiking_layer

LEAKY = NeuronParams(0.9)


def layer(x=None, weight=None, **options):
    x = spikes(10, 3, 8) if x is None else x
    weight = on_grid(5, 8) if weight is None else weight
    return spiking_layer(x, weight, params=options.pop("params", LEAKY), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layer(spikes(10, 3, 9), name="fc1→lif1"),
            r"fc1→lif1: input has shape \(10, 3, 9\), .* \(T, B, 8\)",
        ),
        (lambda: layer(SpikeTrain.from_dense(spikes(10, 3, 9))), r"input has shape \(10, 3, 9\)"),
        (lambda: layer(torch.ones(10, 3, 8, dtype=torch.int64)), "floating dtype, got torch.int64"),
        (lambda: layer(torch.ones(10, 3, 8, dtype=torch.bool)), "floating dtype, got torch.bool"),
        (lambda: layer(spikes(10, 3, 8).double()), "weight is torch.float32, the input torch.float64"),
        (lambda: layer(spikes(10, 8)), r"\(T, B, N...\), got \(10, 8\)"),
        (lambda: layer([[1.0]]), "tensor or a SpikeTrain, got list"),
        (lambda: layer(weight=torch.zeros(5, 8, device="meta")), "weight is on meta, the input on cpu"),
        (lambda: layer(bias=torch.zeros(4)), r"bias has shape \(4,\), expected \(5,\)"),
        (lambda: layer(recurrent_weight=torch.zeros(5, 4)), r"recurrent_weight has shape \(5, 4\)"),
        (lambda: layer(params=NeuronParams(torch.full((4,), 0.9))), r"parameter 'mem' of shape \(4,\)"),
        (
            lambda: layer(state=NeuronState(torch.zeros(3, 4))),
            r"state 'v' has shape \(3, 4\), expected \(3, 5\)",
        ),
        (lambda: layer(weight=torch.zeros(5)), r"weight must be \(N, M\)"),
    ],
)
def test_shapes_dtypes_devices(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias", "input", "current", "state", "params"])
def test_non_finite_values_are_never_silent(where, bad):
    x, weight, bias = spikes(10, 3, 8, p=0.5), on_grid(5, 8), torch.zeros(5)
    state, params = torch.zeros(3, 5), torch.full((5,), 0.9)
    if where == "weight":
        weight[2, 3] = bad
        x[:, :, 3] = 1
    elif where == "input":
        x[4, 1, 3] = bad
    else:
        {"bias": bias, "state": state[0], "params": params}.get(where, bias)[2] = bad
    if where == "current":
        x, weight, bias = torch.zeros(10, 3, 5), None, None
        x[3, 1, 2] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        spiking_layer(
            *(x, weight, bias),
            params=NeuronParams(params),
            spec=NeuronSpec(reset="none"),
            state=NeuronState(state),
            backend="cpu",
        )


@pytest.mark.parametrize(
    "spec",
    [
        NeuronSpec(reset="value", timing="immediate", attached=True),
        NeuronSpec(reset="zero", timing="immediate"),
    ],
    ids=["value", "zero"],
)
def test_an_infinite_current_is_not_reset_away(spec):
    current = torch.zeros(10, 3, 5)
    current[3, 1, 2] = float("inf")
    with pytest.raises(InputError, match="input current has NaN or infinite"):
        spiking_layer(current, params=LEAKY, spec=spec, backend="cpu")


def test_a_nan_threshold_is_not_silence():
    with pytest.raises(InputError, match="decay or threshold has NaN"):
        layer(params=NeuronParams(0.9, threshold=float("nan")), backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_readout_takes_no_recurrence(backend):
    with pytest.raises(InputError, match="emits no spikes"):
        layer(spec=NeuronSpec(reset="none", spiking=False), recurrent_weight=torch.eye(5), backend=backend)


def test_states_are_not_moved_or_rounded_in_silence():
    with pytest.raises(InputError, match="state 'v' is torch.float64, the input torch.float32"):
        layer(state=NeuronState(torch.zeros(3, 5, dtype=torch.float64)))
    with pytest.raises(InputError, match="state 'v' is on meta"):
        layer(state=NeuronState(torch.zeros(3, 5, device="meta")))


def test_no_steps_leave_the_state_as_it_was():
    state = NeuronState(torch.rand(3, 5), None, (torch.rand(3, 5) > 0.5).float())
    out = layer(torch.zeros(0, 3, 8), recurrent_weight=on_grid(5, 5), state=state)
    assert torch.equal(out.state.v, state.v)
    assert torch.equal(out.state.spikes, state.spikes)


def test_check_looks_at_every_tensor():
    weight = on_grid(5, 8)
    weight[0, 0] = float("nan")
    x = torch.zeros(4, 2, 8)  # no spike touches the bad weight
    for check in (False, True):  # 0 times NaN is no 0: it is looked for on a CPU in any case
        with pytest.raises(InputError, match="weight has NaN"):
            layer(x, weight, check=check)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("events", [False, True], ids=["dense", "events"])
@pytest.mark.parametrize("shape", [(0, 3, 8), (5, 0, 8), (5, 3, 0)], ids=["T=0", "B=0", "M=0"])
def test_empty_dimensions_give_empty_results(shape, events, backend):
    T, B, M = shape
    weight = torch.zeros(4, M, requires_grad=True)
    state = NeuronState(torch.rand(B, 4))
    for x in (torch.zeros(shape), SpikeTrain.from_dense(torch.zeros(shape))):
        out = layer(x, weight, events=events, return_mem=True, backend=backend, state=state)
        dense = out.spikes.to_dense() if events else out.spikes
        assert dense.shape == out.mem.shape == (T, B, 4)
        (dense.sum() + out.mem.sum() + out.state.v.sum()).backward()
        assert weight.grad.shape == (4, M)
        assert not weight.grad.any()
    if T == 0:
        assert torch.equal(out.state.v, state.v)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_neurons(backend):
    assert layer(weight=torch.zeros(0, 8), backend=backend).spikes.shape == (10, 3, 0)


def test_non_contiguous_inputs_weights_and_states():
    x, weight = spikes(3, 10, 8).transpose(0, 1), on_grid(8, 5).t()
    state = NeuronState(torch.rand(5, 3).t())
    found = layer(x, weight, state=state, backend="cpu").spikes
    expected = layer(
        x.contiguous(), weight.contiguous(), state=NeuronState(state.v.contiguous()), backend="reference"
    )
    assert torch.equal(found, expected.spikes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, counted):
    x, weight = spikes(10, 3, 8), on_grid(5, 8)
    expected = layer(x, weight, return_mem=True)
    counted.clear()
    out = layer(x.to(dtype), weight.to(dtype), return_mem=True)
    assert counted["cpu", "forward"] == 1
    assert out.spikes.dtype == out.mem.dtype == dtype
    assert torch.equal(out.spikes, expected.spikes.to(dtype))
    assert torch.equal(out.mem, expected.mem.to(dtype))
    assert torch.equal(out.state.v, expected.state.v)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "quantum"}, UnsupportedError, "no backend named 'quantum'. Registered: .*cpu"),
        ({"backend": ""}, ConfigError, "backend must be"),
        ({"backprop_threshold": -1}, ConfigError, "backprop_threshold must be"),
        ({"backprop_threshold": float("nan")}, ConfigError, "backprop_threshold must be"),
        ({"backprop_threshold": "wide"}, ConfigError, "backprop_threshold must be"),
        ({"backprop_threshold": True}, ConfigError, "backprop_threshold must be"),
        ({"min_active": 2}, ConfigError, "min_active must be a fraction"),
        ({"backprop_treshold": 0.2}, ConfigError, "Did you mean 'backprop_threshold'"),
        ({"check": 1}, ConfigError, "check must be True or False"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        layer(**options)


def test_a_custom_surrogate_runs_on_the_reference_and_the_log_says_why(caplog, counted):
    from snn_sparse_plugin import backends

    backends._logged.clear()
    surrogate = Surrogate("custom", function=torch.sigmoid)
    weight = on_grid(5, 8).requires_grad_()
    with caplog.at_level(logging.INFO, logger="snn_sparse_plugin"):
        layer(weight=weight, surrogate=surrogate).spikes.sum().backward()
        layer(weight=weight, surrogate=surrogate)
    assert counted["reference", "backward"] == 1
    assert weight.grad.norm() > 0
    assert sum("custom surrogate" in r.message for r in caplog.records) == 1
    with pytest.raises(UnsupportedError, match="custom surrogate"):
        layer(surrogate=surrogate, backend="cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: NeuronSpec(update="exact"),
        lambda: NeuronSpec(update="euler"),
        lambda: NeuronSpec(update="box", synapse=True),
        lambda: NeuronSpec(attached=True),
        lambda: NeuronSpec(reset="value"),
        lambda: NeuronSpec("euler", True, timing="corrected"),
        lambda: NeuronSpec(spiking=False),
        lambda: Surrogate("softplus"),
        lambda: Surrogate("atan"),
        lambda: Surrogate("custom"),
    ],
)
def test_impossible_neurons_and_surrogates(make):
    with pytest.raises(ConfigError):
        make()


def test_a_weight_changed_in_place_before_backward_raises():
    weight = on_grid(5, 8).requires_grad_()
    out = layer(weight=weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.spikes.sum().backward()


def test_no_grad_saves_nothing():
    weight = on_grid(5, 8).requires_grad_()
    with torch.no_grad():
        out = layer(weight=weight, events=True)
    assert not out.spikes.requires_grad
    assert not out.state.v.requires_grad
