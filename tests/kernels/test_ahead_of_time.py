"""Every kernel compiles for every target, without a device: a kernel that does not build is seen anywhere."""

import os

import pytest

pytest.importorskip("triton.language", reason="the triton extra is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 turns kernels into Python functions", allow_module_level=True)

import triton
from equation_cases import ADAPTIVE, CONDUCTANCE, DELTA, READOUT, SECOND_ORDER
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.core.jacobian import derivatives_of
from snn_sparse_plugin.core.surrogates import KINDS, Surrogate
from snn_sparse_plugin.learners.eprop.described import traced
from snn_sparse_plugin.triton_kernels import (
    backward,
    eprop,
    eprop_step,
    forward,
    neuron,
    packed,
    program,
    program_constants,
    program_kernels,
    spiking_layer,
    surrogates,
    ttfs,
    ttfs_events,
)

KERNELS = {
    "forward": spiking_layer.spiking_layer_forward,
    "backward": spiking_layer.spiking_layer_backward,
}
PROGRAM_KERNELS = {
    "program-forward": program_kernels.program_forward,
    "program-backward": program_kernels.program_backward,
}
TTFS_KERNELS = {
    "ttfs-forward": ttfs.ttfs_forward,
    "ttfs-backward": ttfs.ttfs_backward,
    "dense-events": ttfs_events.dense_events,
    "conv-events": ttfs_events.conv_events,
}
TAPS = {"KH": 3, "KW": 2, "SH": 2, "SW": 1, "TH": 1, "TW": 0, "DH": 1, "DW": 2}
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "cubin"),
    "sm_90": (GPUTarget("cuda", 90, 32), "cubin"),
    "sm_100": (GPUTarget("cuda", 100, 32), "cubin"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hsaco"),
}

DEFAULTS = {
    "WINDOW": 0.2,
    "KIND": "fast_sigmoid",
    "P0": 25.0,
    "P1": 0.0,
    "STATIC_INPUT": False,
    "UPDATE": "decay",
    "SYNAPSE": False,
    "RESET": "subtract",
    "TIMING": "delayed",
    "SCOPE": "state",
    "ATTACHED": False,
    "SPIKING": True,
    "CHUNK": 32,
    "BLOCK_N": 128,
    "TILE": 32,
}
WORDS = {"in_words_ptr", "weight_ptr", "bias_ptr"}
CURRENT = {"x_ptr"}
RECURRENT = {"rec_weight_ptr", "rec_weight_t_ptr", "rec_bias_ptr", "rec0_ptr", "words_ptr"}
SYNAPSE = {"i0_ptr", "i_ptr", "i_checkpoint_ptr", "g_i_ptr", "d_i0_ptr"}
PARAMS = {"d_params_ptr"}

# name -> (constants that differ from the defaults, pointers that are None, element type)
CASES = {
    "leaky-events": ({}, CURRENT | RECURRENT | SYNAPSE | PARAMS, "fp32"),
    "leaky-dense-output": ({}, CURRENT | RECURRENT - {"words_ptr"} | SYNAPSE | PARAMS, "fp32"),
    "leaky-static-current-exact": (
        {"STATIC_INPUT": True, "WINDOW": None},
        WORDS | RECURRENT | SYNAPSE | {"near_ptr"},
        "fp32",
    ),
    "synaptic-zero-sum-atan": (
        {"SYNAPSE": True, "RESET": "zero", "SCOPE": "sum", "KIND": "atan"},
        WORDS | RECURRENT,
        "fp32",
    ),
    "corrected-attached": ({"TIMING": "corrected", "ATTACHED": True}, CURRENT | RECURRENT | SYNAPSE, "fp32"),
    "euler-recurrent-value": (
        {
            "UPDATE": "euler",
            "SYNAPSE": True,
            "RESET": "value",
            "TIMING": "immediate",
            "BLOCK_N": 512,
            "TILE": 8,
        },
        CURRENT,
        "fp32",
    ),
    "box-attached-value-double": (
        {"UPDATE": "box", "RESET": "value", "TIMING": "immediate", "ATTACHED": True, "KIND": "tanh"},
        WORDS | RECURRENT | SYNAPSE,
        "fp64",
    ),
    "one-neuron": ({"N": 1, "in_words": 1, "n_words": 1, "BLOCK_N": 32}, CURRENT, "fp32"),
    "readout": (
        {"UPDATE": "euler", "SYNAPSE": True, "RESET": "none", "TIMING": "immediate", "SPIKING": False},
        CURRENT | RECURRENT | {"spikes_ptr", "g_spikes_ptr", "near_ptr"},
        "fp32",
    ),
}


def compile_kernel(kernel, target, constants, absent, element):
    signature, constexprs, fixed = {}, {}, DEFAULTS | constants
    for name in kernel.arg_names:
        if name in absent or name in fixed:
            signature[name] = "constexpr"
            constexprs[name] = None if name in absent else fixed[name]
        elif name.endswith("words_ptr"):
            signature[name] = "*i32"
        elif name == "near_ptr":
            signature[name] = "*i64"
        else:
            signature[name] = f"*{element}" if name.endswith("_ptr") else "i32"
    warps = min(16, constexprs["BLOCK_N"] // 32)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constexprs), target=target, options=options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel, case, target):
    if target in ("sm_100", "gfx942") and triton.__version__ < "3.3":
        pytest.skip("Triton 3.2 bundles no assembler for this target")
    gpu, binary = TARGETS[target]
    compiled = compile_kernel(KERNELS[kernel], gpu, *CASES[case])
    assert len(compiled.asm[binary]) > 0


PROGRAM_CASES = {
    "adaptive-recurrent": (ADAPTIVE, CURRENT, "fp32"),
    "adaptive-double": (ADAPTIVE, WORDS | RECURRENT, "fp64"),
    "delta": (DELTA, CURRENT | RECURRENT, "fp32"),
    "second-order": (SECOND_ORDER, CURRENT | RECURRENT, "fp32"),
    "two-inputs": (CONDUCTANCE, WORDS, "fp32"),
    "readout": (READOUT, CURRENT | RECURRENT | {"spikes_ptr", "g_spikes_ptr", "near_ptr"}, "fp32"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", PROGRAM_CASES)
@pytest.mark.parametrize("kernel", PROGRAM_KERNELS)
def test_programs_compile(kernel, case, target):
    if target in ("sm_100", "gfx942") and triton.__version__ < "3.3":
        pytest.skip("Triton 3.2 bundles no assembler for this target")
    gpu, binary = TARGETS[target]
    equations, absent, element = PROGRAM_CASES[case]
    constants = program_constants.forward_constants(equations) | program_constants.backward_constants(
        equations, True
    )
    compiled = compile_kernel(PROGRAM_KERNELS[kernel], gpu, constants, absent | SYNAPSE, element)
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("kernel", "rate"), [*((name, 1.0) for name in TTFS_KERNELS), ("ttfs-backward", 0.0)]
)
def test_ttfs_compiles(kernel, rate, element, target):
    function = TTFS_KERNELS[kernel]
    fixed = {"BLOCK": 128, "RATE": rate, "PARAMS": True, **TAPS}
    constexprs = {name: fixed[name] for name in function.arg_names if name in fixed}
    signature = {}
    for name in function.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in ("times_ptr", "index_ptr", "ptr_ptr", "sample_ptr"):
            signature[name] = {"times_ptr": "*u8", "index_ptr": "*i32"}.get(name, "*i64")
        else:
            signature[name] = f"*{element}" if name.endswith("_ptr") else "i32"
    gpu, binary = TARGETS[target]
    compiled = triton.compile(ASTSource(function, signature, constexprs), target=gpu)
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("states", "targets", "out", "element"),
    [(0, 1, -1, "fp32"), (1, 1, -1, "fp32"), (3, 3, 2, "fp32"), (4, 4, 3, "fp64")],
)
def test_the_scan_of_eprop_compiles(states, targets, out, element, target):
    gpu, binary = TARGETS[target]
    rows, lanes = triton.next_power_of_2(states + 1), triton.next_power_of_2(targets)
    constants = {"N_STATES": states, "TARGETS": targets, "OUT": out, "ROWS": rows, "LANES": lanes}
    constants["BLOCK"] = max(16, 1024 // (rows * max(rows, lanes)))
    signature = {
        name: "constexpr" if name in constants else f"*{element}" if name.endswith("_ptr") else "i32"
        for name in eprop.eprop_scan.arg_names
    }
    compiled = triton.compile(
        ASTSource(eprop.eprop_scan, signature, constants), target=gpu, options={"num_warps": 4}
    )
    assert len(compiled.asm[binary]) > 0


STEP_CASES = {
    "leaky": (traced(NeuronSpec(), False), True, "fp32"),
    "euler-recurrent": (traced(NeuronSpec("euler", True, "value", "immediate"), True), False, "fp32"),
    "adaptive-double": (ADAPTIVE, True, "fp64"),
    "readout": (READOUT, True, "fp32"),
}


def compiled_step(case, gpu):
    equations, alone, element = STEP_CASES[case]
    program = equations.program
    output = program.results[0] if program.spikes is None else program.spikes
    found = derivatives_of(program, output)
    fixed = eprop_step.constants(
        program,
        found,
        [output, *program.results],
        sorted(set(found.varying.values())),
        Surrogate("atan", (2.0,)),
    )
    fixed |= {"BLOCK_N": 128} | ({"rec_ptr": None} if alone else {})
    kernel = eprop_step.eprop_step
    signature = {
        name: "constexpr" if name in fixed else f"*{element}" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    options = {"num_warps": 2, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, fixed), target=gpu, options=options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", STEP_CASES)
def test_the_step_of_eprop_compiles(case, target):
    if target in ("sm_100", "gfx942") and triton.__version__ < "3.3":
        pytest.skip("Triton 3.2 bundles no assembler for this target")
    gpu, binary = TARGETS[target]
    compiled = compiled_step(case, gpu)
    assert len(compiled.asm[binary]) > 0
    assert binary != "cubin" or "fma.rn.f32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_surrogate_compiles(kind):
    constants = {"KIND": kind, "P0": 2.0, "P1": 0.5}
    absent = WORDS | RECURRENT | SYNAPSE | PARAMS
    compiled = compile_kernel(KERNELS["backward"], TARGETS["sm_90"][0], constants, absent, "fp32")
    assert len(compiled.asm["cubin"]) > 0


@pytest.mark.parametrize("case", ["leaky-events", "euler-recurrent-value"])
def test_no_multiply_add_is_contracted(case):
    # a fused multiply-add rounds once where upstream rounds twice, and would move spikes
    ptx = compile_kernel(KERNELS["forward"], TARGETS["sm_90"][0], *CASES[case]).asm["ptx"]
    assert "mul.f32" in ptx or "mul.rn.f32" in ptx
    assert "fma.rn" not in ptx


@pytest.mark.parametrize("kernel", KERNELS | PROGRAM_KERNELS)
def test_a_new_length_does_not_recompile(kernel):
    free = {p.name for p in (KERNELS | PROGRAM_KERNELS)[kernel].params if p.do_not_specialize}
    assert {"T", "B"} <= free


def test_the_list_of_kernels_is_complete():
    # every @triton.jit function is a kernel above or a function one of them calls
    found = set()
    for module in (
        forward,
        backward,
        neuron,
        packed,
        program,
        program_kernels,
        surrogates,
        ttfs,
        ttfs_events,
        eprop,
        eprop_step,
    ):
        found |= {k for k, f in vars(module).items() if isinstance(f, triton.JITFunction)}
    called = {
        "input_current",
        "recurrent_current",
        "all_currents",
        "add_recurrent_grad",
        "store_packed",
        "gather_rows",
    }
    called |= {"load_params", "step", "adjoint", "surrogate_grad"}
    called |= {
        "load_rows",
        "store_rows",
        "divide",
        "operate",
        "execute",
        "select",
        "passed_back",
        "execute_back",
    }
    kernels = {**KERNELS, **PROGRAM_KERNELS, **TTFS_KERNELS}
    kernels |= {"eprop-scan": eprop.eprop_scan, "eprop-step": eprop_step.eprop_step}
    assert found - called == {f.__name__ for f in kernels.values()}
