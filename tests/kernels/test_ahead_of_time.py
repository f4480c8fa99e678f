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

from snn_sparse_plugin.core.canonical import traced
from snn_sparse_plugin.core.dynamics import NeuronSpec
from snn_sparse_plugin.core.jacobian import derivatives_of
from snn_sparse_plugin.core.surrogates import KINDS, Surrogate
from snn_sparse_plugin.learners.eprop import lsnn
from snn_sparse_plugin.triton_kernels import (
    eprop,
    eprop_chunk,
    eprop_step,
    eprop_steps,
    generate,
    parts,
    products,
    scans,
    surrogates,
    terms,
    ttfs,
    ttfs_events,
)
from snn_sparse_plugin.triton_kernels.sources import module_of

TTFS_KERNELS = {
    "ttfs-table": ttfs.ttfs_table,
    "ttfs-parameters": ttfs.ttfs_parameters,
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

OPTIONS = {
    "WINDOW": 0.2,
    "KIND": "fast_sigmoid",
    "P0": 25.0,
    "P1": 0.0,
    "odd_ptr": None,
    "BLOCK": 32,
    "TILE": 4,
    "WORDS": 1,
    "SAMPLES": 1,
}
GIVEN = object()  # a pointer that is None in the options above
EXACT = {"WINDOW": None}
NO_GUARD = {"near_ptr": None}
WIDE = {"BLOCK": 512, "TILE": 4, "WORDS": 16}
SEVERAL = {"BLOCK": 256, "TILE": 8, "SAMPLES": 4} | EXACT | NO_GUARD
EVENTS_OUT = {"spikes_ptr": None, "mem_ptr": None, "mem_grad_ptr": None}
DENSE_OUT = {"words_ptr": None}
LAST = {"g_v_ptr": None, "g_i_ptr": None}
NOTHING_KEPT = {"v_kept_ptr": None}
VALUE = {"reset": "value", "timing": "immediate"}

# name -> (neuron, recurrent, what differs from all pointers given and the options above, element type)
LAYERS = {
    "leaky-events": (NeuronSpec(), False, EVENTS_OUT | LAST, "fp32"),
    "leaky-dense-exact": (NeuronSpec(), False, DENSE_OUT | EXACT | NO_GUARD, "fp32"),
    "leaky-once": (NeuronSpec(), False, {"nu_ptr": None} | NO_GUARD, "fp32"),
    "leaky-pairs": (NeuronSpec(), False, EVENTS_OUT | {"odd_ptr": GIVEN, "sum_ptr": None}, "fp32"),
    "leaky-double": (NeuronSpec(), False, {}, "fp64"),
    "leaky-recurrent": (NeuronSpec(), True, EVENTS_OUT | WIDE, "fp32"),
    "leaky-recurrent-exact": (NeuronSpec(), True, EXACT | NO_GUARD | {"rec_bias_ptr": None}, "fp32"),
    "leaky-recurrent-tile": (NeuronSpec(), True, SEVERAL, "fp32"),
    "synaptic-zero-sum": (
        NeuronSpec(synapse=True, reset="zero", scope="sum"),
        False,
        {"KIND": "atan"},
        "fp32",
    ),
    "corrected-attached": (NeuronSpec(timing="corrected", attached=True), False, {}, "fp32"),
    "euler-value-recurrent": (NeuronSpec("euler", True, **VALUE), True, WIDE, "fp32"),
    "box-attached-double": (NeuronSpec("box", attached=True, **VALUE), False, {"KIND": "tanh"}, "fp64"),
    "readout": (
        NeuronSpec("euler", True, "none", "immediate", spiking=False),
        False,
        EXACT | NO_GUARD,
        "fp32",
    ),
    "adaptive-recurrent": (ADAPTIVE, True, {}, "fp32"),
    "adaptive-double": (ADAPTIVE, False, {}, "fp64"),
    "delta": (DELTA, False, {}, "fp32"),
    "second-order": (SECOND_ORDER, False, {}, "fp32"),
    "two-inputs-recurrent": (CONDUCTANCE, True, {}, "fp32"),
    "two-inputs-recurrent-tile": (CONDUCTANCE, True, SEVERAL, "fp64"),
    "readout-by-equations": (READOUT, False, EXACT | NO_GUARD, "fp32"),
}


def compile_layer(way, neuron, recurrent, changes, element, gpu, unroll=2, **pointers):
    described = scans.neuron_of(neuron, recurrent)
    if way == "forward":
        source = scans.forward_source(described, recurrent, unroll)
    elif recurrent:
        samples = (OPTIONS | changes)["SAMPLES"]
        source = scans.recurrent_backward_source(described, unroll, True, samples)
    else:
        source = scans.backward_source(described, unroll, True)
    kernel = getattr(module_of(source, way), way)
    fixed = {k: v for k, v in (OPTIONS | changes).items() if k in kernel.arg_names and v is not GIVEN}
    warps = min(16, fixed["BLOCK"] // 32)
    options = {"num_warps": warps, "enable_fp_fusion": False, "num_stages": 1}
    return compile_kernel(kernel, fixed, element, gpu, options, **pointers)


INTEGERS = {"words_ptr": "*i32", "bits_ptr": "*i32", "odd_ptr": "*i32", "near_ptr": "*i64"}


def compile_kernel(kernel, fixed, element, gpu, options, **pointers):
    signature = {}
    for name in kernel.arg_names:
        if name in fixed:
            signature[name] = "constexpr"
        else:
            pointer = (INTEGERS | pointers).get(name, f"*{element}")
            signature[name] = pointer if name.endswith("_ptr") else "i32"
    return triton.compile(ASTSource(kernel, signature, fixed), target=gpu, options=options)


EVERYWHERE = ("leaky-events", "leaky-recurrent", "leaky-recurrent-tile", "adaptive-double", "readout")


def of_every_target():
    for case in LAYERS:
        for target in TARGETS:
            quick = target == "sm_90" or case in EVERYWHERE
            yield pytest.param(case, target, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("case", "target"), of_every_target())
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_layers_compile(way, case, target):
    gpu, binary = TARGETS[target]
    compiled = compile_layer(way, *LAYERS[case], gpu)
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["synaptic-zero-sum", "two-inputs-recurrent"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_comes_and_leaves_may_be_in_half_precision(way, case, half):
    names = (
        "x",
        "spikes",
        "mem",
        "spikes_grad",
        "mem_grad",
        "nu",
        "rec_weight",
        "rec_weight_t",
        "rec_bias",
        "rec0",
    )
    pointers = {f"{name}_ptr": f"*{half}" for name in names}
    compiled = compile_layer(way, *LAYERS[case], TARGETS["sm_90"][0], **pointers)
    assert len(compiled.asm["cubin"]) > 0


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("case", ["leaky-events", "synaptic-zero-sum"])
def test_layers_compile_as_they_are_run(case, way):
    # the cases above hold two steps in registers, which compiles sooner
    unroll = generate.unrolled(scans.neuron_of(*LAYERS[case][:2]).program, 4)
    assert unroll == {"leaky-events": 16, "synaptic-zero-sum": 16}[case]
    compiled = compile_layer(way, *LAYERS[case], TARGETS["sm_90"][0], unroll)
    assert len(compiled.asm["cubin"]) > 0


PRODUCTS = {
    "sum": (products.sum_rows, {"BLOCK": 256, "values_ptr": None, "PAIRS": False}, 1),
    "sum-of-values": (products.sum_rows, {"BLOCK": 32, "bias_ptr": None, "PAIRS": False}, 1),
    "pack": (products.pack_rows, {"ROWS": 16, "WORDS": 8}, 4),
    "transpose": (products.transpose_words, {"ROWS": 1024}, 4),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ["fp32", "fp64"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_compile(case, element, target):
    kernel, fixed, warps = PRODUCTS[case]
    gpu, binary = TARGETS[target]
    element = "i32" if case == "transpose" else element
    compiled = compile_kernel(kernel, fixed, element, gpu, {"num_warps": warps})
    assert len(compiled.asm[binary]) > 0


TILES = {"ROWS": 32, "COLS": 32}
# name -> (kernel, fixed arguments, what its out is made of)
TERMS = {
    "sum-of-pairs": (products.sum_rows, {"BLOCK": 256, "values_ptr": None, "PAIRS": True}, "*fp32"),
    "unpack": (terms.unpack_three, {"ROWS": 32}, "*i16"),
    "weight-terms": (terms.weight_terms, TILES, "*i16"),
    "weight-pairs": (terms.weight_pairs, TILES, "*i16"),
    "again": (terms.again_where_odd, {"BLOCK": 32}, "*fp32"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", TERMS)
def test_terms_compile(case, target):
    kernel, fixed, out = TERMS[case]
    gpu, binary = TARGETS[target]
    compiled = compile_kernel(kernel, fixed, "fp32", gpu, {"num_warps": 4}, out_ptr=out)
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("element", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("kernel", "rate"),
    [*((name, 1.0) for name in TTFS_KERNELS), *((f"ttfs-{name}", 0.0) for name in ("table", "backward"))],
)
def test_ttfs_compiles(kernel, rate, element, target):
    function = TTFS_KERNELS[kernel]
    fixed = {
        "BLOCK": 128,
        "RATE": rate,
        "PARAMS": True,
        "SEARCH": 6,
        "AHEAD": 0.5,
        "LEAST": 1e-38,
        "MOST": 3e38,
    }
    fixed |= TAPS
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


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("function", [ttfs.ttfs_forward, ttfs.ttfs_backward])
def test_ttfs_of_half_precision_moves_sixteen_bytes_at_a_time(function, half):
    fixed = {"BLOCK": ttfs.BLOCK, "RATE": 1.0, "PARAMS": True, "SEARCH": 6}
    constexprs = {name: fixed[name] for name in function.arg_names if name in fixed}
    pointers = dict.fromkeys(("x_ptr", "grad_ptr", "out_ptr"), f"*{half}") | {"times_ptr": "*u8"}
    signature = {
        name: "constexpr"
        if name in constexprs
        else pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    aligned = [
        k for k, name in enumerate(function.arg_names) if name == "n" or signature[name].startswith("*")
    ]
    source = ASTSource(function, signature, constexprs, {(k,): [["tt.divisibility", 16]] for k in aligned})
    ptx = triton.compile(source, target=TARGETS["sm_90"][0], options={"num_warps": ttfs.WARPS}).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("states", "memory", "lanes", "element"),
    [(0, 0, (), "fp32"), (1, 0, (0,), "fp32"), (2, 1, (1, 2), "fp32"), (3, 2, (0, 1, 3, 4), "fp64")],
)
def test_the_scan_of_eprop_compiles(states, memory, lanes, element, target):
    gpu, binary = TARGETS[target]
    places = tuple((r, c) for r in range(1 + states) for c in range(1 + states))
    numbers = (((0, 0), 1.0),) if not states else (((1, 1), 0.9), ((1, 0), 1.0))
    varying = tuple(place for place in places if place not in dict(numbers))
    source = eprop.source_of(varying, tuple(range(len(varying))), numbers, states, memory, 0, lanes)
    kernel = module_of(source, "eprop_scan").scan
    compiled = compile_kernel(kernel, {"BLOCK": 128}, element, gpu, {"num_warps": 4})
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shared", "own", "carry", "element"),
    [((0,), (1, 2), True, "fp32"), ((), (0,), False, "fp32"), ((0, 1), (2, 3), True, "fp64")],
)
def test_the_traces_of_eprop_compile(shared, own, carry, element, target):
    gpu, binary = TARGETS[target]
    source = eprop_chunk.source_of(len(shared) + len(own), shared, own, carry)
    kernel = module_of(source, "eprop_chunk").sum_and_carry
    compiled = compile_kernel(kernel, {"ROWS": 8, "BLOCK": 64}, element, gpu, {"num_warps": 1})
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_filter_of_eprop_compiles(reverse, target):
    gpu, binary = TARGETS[target]
    fixed = {"DECAY": 0.9, "REVERSE": reverse, "BLOCK": 128}
    compiled = compile_kernel(eprop.leaky, fixed, "fp32", gpu, {"num_warps": 4})
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("element", ["fp32", "fp64"])
def test_the_chunk_of_eprop_compiles(element, recurrent, target):
    gpu, binary = TARGETS[target]
    program = lsnn._EQUATIONS.program
    found = derivatives_of(program, program.spikes)
    kept = tuple(sorted(set(found.varying.values())))
    kernel = module_of(eprop_steps.source_of(program, found, kept), "eprop_steps").chunk
    fixed = {"KIND": "triangle", "P0": 0.3, "P1": 0.0, "BLOCK": 256}
    fixed |= {} if recurrent else {"rec_weight_t_ptr": None, "words_ptr": None}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    compiled = compile_kernel(kernel, fixed, element, gpu, options)
    assert len(compiled.asm[binary]) > 0
    assert binary != "cubin" or "fma.rn.f32" not in compiled.asm["ptx"]


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
    kept = tuple(sorted(set(found.varying.values())))
    kernel = module_of(eprop_step.source_of(program, found, (output, *program.results), kept), "eprop").step
    surrogate = Surrogate("atan", (2.0,))
    fixed = {"KIND": surrogate.kind, "P0": 2.0, "P1": 0.0, "BLOCK": 128} | (
        {"rec_ptr": None} if alone else {}
    )
    return compile_kernel(
        kernel, fixed, element, gpu, {"num_warps": 2, "enable_fp_fusion": False, "num_stages": 1}
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", STEP_CASES)
def test_the_step_of_eprop_compiles(case, target):
    gpu, binary = TARGETS[target]
    compiled = compiled_step(case, gpu)
    assert len(compiled.asm[binary]) > 0
    assert binary != "cubin" or "fma.rn.f32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_surrogate_compiles(kind):
    changes = {"KIND": kind, "P0": 2.0, "P1": 0.5}
    compiled = compile_layer("backward", NeuronSpec(), True, changes, "fp32", TARGETS["sm_90"][0])
    assert len(compiled.asm["cubin"]) > 0


@pytest.mark.parametrize("case", ["leaky-events", "euler-value-recurrent", "adaptive-recurrent"])
def test_no_multiply_add_is_contracted(case):
    # a fused multiply-add rounds once where upstream rounds twice, and would move spikes
    ptx = compile_layer("forward", *LAYERS[case], TARGETS["sm_90"][0]).asm["ptx"]
    assert "mul.f32" in ptx or "mul.rn.f32" in ptx
    assert "fma.rn" not in ptx


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_new_length_does_not_recompile(way, recurrent):
    kernel = getattr(module_of(scans.source_of(NeuronSpec(), recurrent, way), way), way)
    free = {p.name for p in kernel.params if p.do_not_specialize}
    assert {"T", "B", "x_stride"} <= free


def test_the_list_of_kernels_is_complete():
    # every @triton.jit function is a kernel above or a function one of them calls
    found = set()
    for module in (parts, products, surrogates, terms, ttfs, ttfs_events, eprop, eprop_chunk, eprop_steps):
        found |= {k for k, f in vars(module).items() if isinstance(f, triton.JITFunction)}
    called = {name for name, f in vars(parts).items() if isinstance(f, triton.JITFunction)}
    kernels = {f.__name__ for f in TTFS_KERNELS.values()} | {
        kernel.__name__ for kernel, _, _ in (*PRODUCTS.values(), *TERMS.values())
    }
    assert found - called == kernels | {eprop.leaky.__name__}
