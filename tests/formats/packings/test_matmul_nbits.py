"""MatMulNBits operands against ONNX Runtime's own kernel, by multiplying the identity."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tightship.formats.layouts import parse_layout
from tightship.formats.packings.matmul_nbits import NBits, nbits_for, pack, unpack, values
from tightship.target import Refused


def kernel_values(operands: dict[str, np.ndarray], spec: NBits) -> np.ndarray:
    """(rows, cols) float32: ONNX Runtime's MatMulNBits applied to the identity."""
    rows = operands["B"].shape[0]
    names = [key for key in ("B", "scales", "zero_points") if key in operands]
    node = helper.make_node(
        "MatMulNBits", ["A", *names], ["Y"], domain="com.microsoft",
        K=spec.cols, N=rows, bits=spec.bits, block_size=spec.block, accuracy_level=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [spec.cols, spec.cols])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(operands[key], key) for key in names],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"A": np.eye(spec.cols, dtype=np.float32)})[0].T


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", ["g16", "g32", "g64", "g128", "g256", "g48", "channel"])
@pytest.mark.parametrize("asym", ["", "-asym"])
def test_the_kernel_reads_the_layouts_values(bits: int, group: str, asym: str) -> None:
    cols = {"g48": 96, "channel": 80}.get(group, 256)
    layout = parse_layout(f"int{bits}-{group}{asym}")
    weight = np.random.default_rng(bits).normal(size=(24, cols)).astype(np.float32)
    arrays = layout.quantize(weight)
    spec = nbits_for(layout, cols)
    assert isinstance(spec, NBits)
    operands = pack(layout, arrays, spec)
    expected = layout.values(arrays)
    np.testing.assert_array_equal(values(operands, spec), expected)
    np.testing.assert_array_equal(kernel_values(operands, spec), expected.astype(np.float32))
    codes, _ = unpack(operands, spec)
    np.testing.assert_array_equal(codes, arrays["codes"].astype(np.int16) + (1 << (spec.bits - 1)))
    for key, (dtype, shape) in spec.shapes(24).items():
        assert operands[key].dtype == dtype
        assert operands[key].shape == shape


@pytest.mark.parametrize("word", ["q2_k", "q3_k", "q4_1", "q4_k", "q5_1", "q5_k", "q6_k", "tq1_0", "tq2_0"])
def test_ggml_layouts_keep_their_values(word: str) -> None:
    """The kernel's product with the identity, plus the minimum of each block, is what libggml's block says."""
    layout = parse_layout(word)
    weight = np.random.default_rng(3).normal(0.3, 1, size=(8, 512)).astype(np.float32)
    arrays = layout.quantize(weight)
    spec = nbits_for(layout, 512)
    operands = pack(layout, arrays, spec)
    np.testing.assert_array_equal(values(operands, spec), layout.values(arrays))
    without = kernel_values(operands, spec)
    offsets = np.repeat(operands["offsets"].T, spec.block, axis=1) if spec.offsets else np.float32(0)
    np.testing.assert_array_equal(without + offsets, layout.values(arrays).astype(np.float32))
    assert operands["B"].dtype == np.uint8
    assert spec.offsets == (word in ("q2_k", "q4_1", "q4_k", "q5_1", "q5_k"))


@pytest.mark.parametrize("word", ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4"])
def test_layouts_with_a_table_are_refused(word: str) -> None:
    assert isinstance(nbits_for(parse_layout(word), 512), Refused)


def test_hand_packed_bytes() -> None:
    """Columns 0 and 1 of a 4-bit block share byte 0, the first in the low nibble."""
    layout = parse_layout("int4-g16")
    codes = np.zeros((1, 16), np.int8)
    codes[0, :4] = [-8, 7, 1, -1]
    operands = pack(layout, {"codes": codes, "scale": np.ones((1, 1), np.float16)}, nbits_for(layout, 16))
    assert operands["B"][0, 0, :3].tolist() == [0xF0, 0x79, 0x88]


def test_groups_without_a_legal_block_are_refused() -> None:
    assert isinstance(nbits_for(parse_layout("int4-g24"), 48), Refused)


@pytest.mark.parametrize(
    ("word", "bits", "block"),
    [
        ("int2-g16", 4, 16),
        ("int2-g64", 2, 64),
        ("int2-g256", 2, 128),
        ("int2-channel", 2, 128),
        ("q2_k", 4, 16),
        ("tq2_0", 2, 128),
        ("int4-g256", 4, 256),
        ("int3-g16", 4, 16),
        ("q6_k", 8, 16),
    ],
)
def test_containers_have_a_kernel(word: str, bits: int, block: int) -> None:
    """ONNX Runtime decodes 2 bits in blocks of 16 and 256 anew for every product (benchmarks/onnx_kernels.py)."""
    spec = nbits_for(parse_layout(word), 512)
    assert isinstance(spec, NBits)
    assert (spec.bits, spec.block) == (bits, block)


def test_a_table_of_one_scale_a_row_has_whole_blocks() -> None:
    """A row of 576 columns is 9 blocks of 64; a product takes the widest block and fills up the last one."""
    layout = parse_layout("int8-channel")
    table, product = nbits_for(layout, 576, table=True), nbits_for(layout, 576)
    assert isinstance(table, NBits)
    assert isinstance(product, NBits)
    assert (table.block, product.block) == (64, 256)
