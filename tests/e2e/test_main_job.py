"""The main job: one command, three artifacts, the same integers in each, read back by decoders that are not ours."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tightship
from tightship.errors import GateFailed, Unsupported

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Arrays = dict[str, np.ndarray]


def gguf_tensors(path: Path) -> dict[str, Any]:
    """Block linears as the gguf package reads them, under the source's names."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        _, _, rest = tensor.name.partition("blk.")
        number, _, kind = rest.partition(".")
        if kind.removesuffix(".weight") in GGUF_NAMES:
            found[f"model.layers.{number}.{GGUF_NAMES[kind.removesuffix('.weight')]}"] = tensor
    return found


def rows_of_the_source(name: str, rows: np.ndarray) -> np.ndarray:
    """llama.cpp wants the halves of every rotated head interleaved; back to the order of transformers."""
    heads = next((count for part, count in HEADS.items() if part in name), None)
    if heads is None:
        return rows
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def gguf_values(path: Path) -> Arrays:
    import gguf

    return {
        name: rows_of_the_source(name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for name, tensor in gguf_tensors(path).items()
    }


def onnx_nodes(directory: Path) -> dict[str, tuple[Any, list[Any]]]:
    """MatMulNBits nodes with the initializers of each matrix in them, under the source's names."""
    import onnx

    model = onnx.load(directory / "model.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    joined = {node.output[0]: list(node.input) for node in model.graph.node if node.op_type == "Concat"}
    found = {}
    for node in (n for n in model.graph.node if n.op_type == "MatMulNBits"):
        for names in zip(*(joined.get(i, [i]) for i in node.input[1:]), strict=True):
            found[names[0].removesuffix(".weight.B")] = (node, [constants[i] for i in names if i])
    return found


def onnx_values(directory: Path) -> Arrays:
    """Each node alone in ONNX Runtime, on the identity: a product with one term a sum is exact."""
    import onnx
    import onnxruntime as ort

    found = {}
    for name, (node, constants) in onnx_nodes(directory).items():
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes |= {"accuracy_level": 0, "N": constants[0].dims[0]}
        names = ["x", *(tensor.name for tensor in constants)]
        alone = onnx.helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
        infos = [onnx.helper.make_tensor_value_info(word, onnx.TensorProto.FLOAT, None) for word in "xy"]
        graph = onnx.helper.make_graph([alone], "alone", infos[:1], infos[1:], constants)
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found[name] = session.run(None, {"x": np.eye(attributes["K"], dtype=np.float32)})[0].T
    return found


def packed_tensors(directory: Path) -> dict[str, Arrays]:
    """Tensors of every packed matrix, by the safetensors package, under the source's names."""
    from safetensors.numpy import load_file

    found: dict[str, Arrays] = {}
    for name, array in load_file(directory / "model.safetensors").items():
        stem, _, last = name.rpartition(".")
        if last.startswith("weight_"):
            found.setdefault(stem, {})[last] = array
    return found


def safetensors_values(directory: Path) -> Arrays:
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    found = {}
    for name, arrays in packed_tensors(directory).items():
        state = {last: torch.from_numpy(array) for last, array in arrays.items()}
        found[name] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].float().numpy()
    return found


def values(output: Path) -> tuple[Arrays, Arrays, Arrays]:
    return (
        gguf_values(output / "gguf" / "ember.gguf"),
        onnx_values(output / "onnx"),
        safetensors_values(output / "safetensors"),
    )


def source_linears() -> Arrays:
    from safetensors.torch import load_file

    weights = load_file(EMBER / "model.safetensors")
    return {n.removesuffix(".weight"): w.float().numpy() for n, w in weights.items() if "_proj" in n}


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Low then high half of every byte, on a new last axis."""
    return np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int64)


@pytest.mark.slow
def test_the_report_of_the_main_job(main_job: Any) -> None:
    assert main_job.code == 0
    report = json.loads((main_job.output / "report.json").read_text())
    assert report["verdict"] == "pass"
    assert [target["id"] for target in report["targets"]] == ["gguf", "onnx", "safetensors"]
    checks = {check["id"]: check for target in report["targets"] for check in target["checks"]}
    assert all(check["verdict"] == "pass" for check in checks.values())
    for container in ("onnx", "safetensors"):
        same = checks[f"{container}/reader/values/integers_unlike_other_targets"]
        assert (same["value"], same["threshold"], same["extra"]["tensors"]) == (0, 0, 14)
    assert (
        checks["gguf/reader/values/integers"]["extra"]["sha256"]
        == (checks["onnx/reader/values/integers"]["extra"]["sha256"])
    )
    for name in (
        "gguf/llama.cpp/graph/rel_l2",
        "gguf/onnxruntime/graph/rel_l2",
        "onnx/onnxruntime/graph/rel_l2",
        "onnx/onnxruntime/graph/rel_l2_through_cache",
        "onnx/onnxruntime-genai/runtime/rel_l2",
        "safetensors/transformers/graph/rel_l2",
    ):
        assert checks[name]["op"] == "<=", name
    for target in report["targets"]:
        loss = [c for c in target["checks"] if c["kind"] == "loss" and c["runtime"] != "torch"]
        assert {"kl_mean", "top1", "non_finite"} <= {c["metric"] for c in loss}
        assert {c["threshold_source"] for c in loss if c["metric"] == "top1"} == {"no budget set"}
    text = (main_job.output / "report.md").read_text()
    assert "`gguf`, `onnx`, `safetensors` hold the same integers and scales" in text


@pytest.mark.slow
def test_foreign_decoders_read_the_same_numbers(main_job: Any) -> None:
    of_gguf, of_onnx, of_safetensors = values(main_job.output)
    source = source_linears()
    assert set(of_gguf) == set(of_onnx) == set(of_safetensors) == set(source)
    for name, expected in source.items():
        assert np.abs(of_gguf[name] - of_onnx[name]).max() == 0, name
        assert np.abs(of_gguf[name] - of_safetensors[name]).max() == 0, name
        blocks = expected.reshape(len(expected), -1, 32)
        bound = np.repeat(np.abs(blocks).max(-1) / 7, 32, axis=-1)  # a step of a four-bit grid is never wider
        assert (np.abs(of_gguf[name] - expected) <= bound).all(), name


@pytest.mark.slow
def test_the_integers_are_the_same_bit_for_bit(main_job: Any) -> None:
    """Codes and scales cut out of the bytes by each format's own definition."""
    nodes = onnx_nodes(main_job.output / "onnx")
    packed = packed_tensors(main_job.output / "safetensors")
    for name, tensor in gguf_tensors(main_job.output / "gguf" / "ember.gguf").items():
        blocks = np.asarray(tensor.data).reshape(len(tensor.data), -1, 18)  # float16 scale, 16 bytes of nibbles
        halves = nibbles(blocks[:, :, 2:])
        codes = rows_of_the_source(name, np.concatenate([halves[..., 0], halves[..., 1]], -1).reshape(len(blocks), -1))
        scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[..., 0]
        scales = rows_of_the_source(name, scales).astype(np.float32)
        import onnx

        bytes_, stored = (onnx.numpy_helper.to_array(constant) for constant in nodes[name][1][:2])
        np.testing.assert_array_equal(nibbles(bytes_).reshape(codes.shape), codes, err_msg=name)
        np.testing.assert_array_equal(stored.reshape(scales.shape), scales, err_msg=name)
        words = packed[name]["weight_packed"].view(np.uint32)
        unpacked = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
        np.testing.assert_array_equal(unpacked.reshape(codes.shape), codes, err_msg=name)
        np.testing.assert_array_equal(packed[name]["weight_scale"].astype(np.float32), scales, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("without_proof")
@pytest.mark.parametrize("layout", ["int8", "int4-asym"])
def test_other_layouts_in_all_three(layout: str, tmp_path: Path) -> None:
    to = ["gguf", "onnx", "safetensors"]
    tightship.build(EMBER, output=tmp_path / "out", quantize=layout, to=to, work=tmp_path / "work", threads=1)
    of_gguf, of_onnx, of_safetensors = values(tmp_path / "out")
    assert len(of_gguf) == len(source_linears())
    for name, expected in source_linears().items():
        assert np.abs(of_gguf[name] - of_onnx[name]).max() == 0, name
        assert np.abs(of_gguf[name] - of_safetensors[name]).max() == 0, name
        assert np.abs(of_gguf[name] - expected).max() <= np.abs(expected).max() / (100 if layout == "int8" else 7)


def test_what_a_container_cannot_hold_is_refused_with_the_nearest() -> None:
    with pytest.raises(Unsupported) as caught:
        tightship.plan(EMBER, quantize="int8-asym", to=["gguf", "onnx"])
    assert caught.value.exit_code == 3
    assert caught.value.tensor
    said = f"{caught.value} {caught.value.hint}"
    assert "int8" in said
    assert "int4-g32-asym" in said or "int4-asym" in said


@pytest.mark.slow
def test_planned_bytes_are_the_files(main_job: Any) -> None:
    to = ["gguf", "onnx", "safetensors"]
    planned = {t.plan.target.id: t.plan for t in tightship.plan(EMBER, quantize="int4", to=to).targets}
    main = {"gguf": "gguf/ember.gguf", "onnx": "onnx/model.onnx_data", "safetensors": "safetensors/model.safetensors"}
    sizes = {name: (main_job.output / path).stat().st_size for name, path in main.items()}
    sizes["onnx"] += sum((main_job.output / f"onnx/{name}.onnx").stat().st_size for name in ("model", "genai"))
    for name, plan in planned.items():
        beyond = main_job.checks[f"{name}/reader/structure/bytes_beyond_plan"]
        assert sizes[name] - plan.file_bytes == beyond["value"], name
    assert planned["gguf"].file_bytes == sizes["gguf"]


@pytest.mark.slow
def test_inspect_without_torch(main_job: Any, tightship_command: Callable[..., Any]) -> None:
    blocked = main_job.output.parent / "blocked"
    for module in ("torch", "transformers", "onnxruntime"):
        (blocked / module).mkdir(parents=True, exist_ok=True)
        (blocked / module / "__init__.py").write_text("raise ImportError('not here')\n")
    done = tightship_command(
        "inspect", str(main_job.output), "--json", cwd=main_job.output.parent, PYTHONPATH=str(blocked)
    )
    assert done.returncode == 0, done.stderr
    files = {file["container"]: file for file in json.loads(done.stdout)["result"]["files"]}
    planned = {t["id"]: t["bits_per_weight"] for t in main_job.body["result"]["targets"]}
    weights = sum(math.prod(a.shape) for a in source_linears().values()) + 1024 * 256 + 5 * 256
    for container, file in files.items():
        constants = 64 if container == "onnx" else 0  # at most: 32 frequencies of the rotary embedding, shapes, scalars
        assert weights <= file["weights"] <= weights + constants, container
        assert file["tensor_bytes"] == pytest.approx(planned[container] * weights / 8, rel=0.003)


@pytest.mark.slow
def test_verify_finds_a_flipped_bit_anywhere_and_a_file_too_many(main_job: Any, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(main_job.output, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert tightship.verify(copy).files == len(manifest["files"]) == 15
    rng = np.random.default_rng(0)
    for entry in manifest["files"]:
        path = copy / entry["path"]
        good = path.read_bytes()
        for place in (0, len(good) - 1, int(rng.integers(len(good)))):
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            with pytest.raises(GateFailed, match=path.name):
                tightship.verify(copy)
        path.unlink()
        with pytest.raises(GateFailed, match=path.name):
            tightship.verify(copy)
        path.write_bytes(good)
    (copy / "onnx" / "surplus.bin").write_bytes(b"")
    with pytest.raises(GateFailed, match=r"surplus\.bin"):
        tightship.verify(copy)


@pytest.mark.slow
def test_verify_proves_again(main_job: Any, tightship_command: Callable[..., Any]) -> None:
    done = tightship_command("verify", "out", "--against", str(EMBER), "--json", cwd=main_job.output.parent)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)["result"]["report"]
    assert again["verdict"] == "pass"
    found = {check["id"] for target in again["targets"] for check in target["checks"]}
    assert {i for i in main_job.checks if "random_model" not in i} == found
