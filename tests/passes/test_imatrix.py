"""Importance measured by hooks on transformers' own modules; files taken as llama-quantize takes them, bit by bit."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tightship.errors import Malformed, UsageError
from tightship.exporters.to_gguf import GgufExporter
from tightship.formats.imatrix import Entry, Imatrix, imatrix_bytes, legacy_bytes, read_imatrix
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.base import Run
from tightship.passes.calibration import calibration_windows
from tightship.recipe import Recipe
from tightship.stages import for_container, scheme_stage
from tightship.target import Target

EMBER = Path(__file__).parents[2] / "examples" / "ember"
TEXTS = ("The ship sails at dawn. " * 30, "Numbers: 1, 2, 3, and so on. " * 30)
RUN = Run(texts=TEXTS, tokens=256, sequence=64)
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def hooked(windows: Any) -> dict[str, np.ndarray]:
    """GGUF name -> float64 sums of squares of what flows into transformers' linears."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBER, dtype=torch.float32, attn_implementation="eager")
    sums: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".layers." not in name:
            continue
        block, role = name.split(".layers.")[1].split(".", 1)
        key = f"blk.{block}.{GGUF_NAMES[role]}.weight"

        def note(_module: Any, args: Any, key: str = key) -> None:
            x = args[0].double().reshape(-1, args[0].shape[-1])
            sums[key] = sums.get(key, 0) + (x * x).sum(0).numpy()

        module.register_forward_pre_hook(note)
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(np.asarray(window)[None]))
    return sums


def test_measured_importance_is_what_hooks_see(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(EMBER)
    after = pass_for("imatrix", {}).apply(checkpoint, RUN)
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(after.files["imatrix.gguf"])
    windows = calibration_windows(checkpoint, RUN)
    expected = hooked(windows)
    found = read_imatrix(path)
    assert set(found.entries) == set(expected)
    tokens = sum(len(window) for window in windows)
    for name, sums in expected.items():
        np.testing.assert_allclose(found.entries[name].sums[0], sums, rtol=1e-5, err_msg=name)
        assert found.entries[name].counts.tolist() == [tokens]
    assert (found.chunks, found.chunk_size) == (len(windows), 64)
    assert dict(after.weights) == dict(checkpoint.weights)


class _Data(ctypes.Structure):
    """llama.h: struct llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def llama_quantize(source: Path, target: Path, file_type: str, imatrix: Path) -> None:
    """llama_model_quantize with an importance matrix, read as tools/quantize does: sums over counts.

    The wheel's parameters show the pointer and do not let it be set; it stands 24 bytes behind `nthread` in llama.h.
    """
    library = pytest.importorskip("cyllama.llama.llama_cpp")
    tensors = {t.name: t.data for t in gguf.GGUFReader(imatrix).tensors}
    means = {
        name.removesuffix(".in_sum2"): data / tensors[name.replace(".in_sum2", ".counts")]
        for name, data in tensors.items()
        if name.endswith(".in_sum2")
    }
    entries = [_Data(name.encode(), data.ctypes.data, data.size) for name, data in means.items()]
    table = (_Data * (len(entries) + 1))(*entries)
    params = library.LlamaModelQuantizeParams()
    marker = 0x5EA5ABE
    params.nthread = marker
    memory = ctypes.string_at(id(params), type(params).__basicsize__)
    place = id(params) + memory.index(marker.to_bytes(4, "little"))
    params.nthread, params.ftype = 1, int(gguf.LlamaFileType[file_type])
    ctypes.c_void_p.from_address(place + 24).value = ctypes.addressof(table)
    library.model_quantize(str(source), str(target), params)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 GGUF file of ember, and an importance matrix for it with uneven channels."""
    folder = tmp_path_factory.mktemp("foreign")
    checkpoint = open_checkpoint(EMBER)
    exporter, target = GgufExporter(), Target("gguf")
    (folder / "plain").mkdir()
    main = exporter.export(checkpoint, exporter.plan(checkpoint, target), folder / "plain").main
    rng = np.random.default_rng(0)
    entries = {}
    for info in checkpoint.linears():
        sums = np.exp(rng.normal(0, 2, (1, info.shape[1]))).astype(np.float32)
        entries[f"blk.{info.block}.{GGUF_NAMES[info.name.split('.', 3)[3].removesuffix('.weight')]}.weight"] = Entry(
            sums, np.array([100], np.float32)
        )
    path = folder / "foreign.gguf"
    path.write_bytes(imatrix_bytes(Imatrix(entries, ("elsewhere",), 1, 100)))
    return folder / "plain" / main, path


def built(scheme: str, imatrix: Path, folder: Path) -> Path:
    """The file of a scheme with `with: {imatrix: FILE}`, as a build makes it."""
    folder.mkdir()
    checkpoint, exporter, recipe = open_checkpoint(EMBER), GgufExporter(), Recipe()
    target = Target("gguf", scheme, {"imatrix": str(imatrix)})
    stage = scheme_stage(checkpoint, target, exporter, recipe)
    assert stage is not None
    assert stage.streamed
    stage.work.requires(checkpoint)
    solved = stage.work.apply(checkpoint, Run())
    theirs = for_container(target, recipe)
    return folder / exporter.export(solved, exporter.plan(solved, theirs), folder).main


@pytest.mark.parametrize("scheme", ["q4_k_m", "q4_0", "q5_1", "q2_k", "q3_k_m", "iq4_xs"])
def test_whole_file_is_llama_quantizes(scheme: str, foreign: tuple[Path, Path], tmp_path: Path) -> None:
    source, imatrix = foreign
    theirs = tmp_path / "theirs.gguf"
    names = {"q4_0": "MOSTLY_Q4_0", "q5_1": "MOSTLY_Q5_1", "q2_k": "MOSTLY_Q2_K", "iq4_xs": "MOSTLY_IQ4_XS"}
    llama_quantize(source, theirs, names.get(scheme, f"MOSTLY_{scheme.upper()}"), imatrix)
    ours = built(scheme, imatrix, tmp_path / "ours")
    assert ours.read_bytes() == theirs.read_bytes()


def test_older_format_makes_the_same_file(foreign: tuple[Path, Path], tmp_path: Path) -> None:
    imatrix = foreign[1]
    older = tmp_path / "imatrix.dat"
    exact = {
        name: Entry(entry.importance, np.ones(1, np.float32)) for name, entry in read_imatrix(imatrix).entries.items()
    }
    older.write_bytes(legacy_bytes(Imatrix(exact, ("elsewhere",), 1, 1)))
    first, second = (built("q4_k_m", path, tmp_path / path.stem) for path in (imatrix, older))
    assert first.read_bytes() == second.read_bytes()


def test_key_holds_the_content_and_not_the_path(foreign: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"solver": "importance", "layout": "int4"}
    copy, other = tmp_path / "copy.gguf", tmp_path / "other.gguf"
    copy.write_bytes(foreign[1].read_bytes())
    other.write_bytes(imatrix_bytes(Imatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 256)), np.ones(1))})))
    keys = [pass_for("quantize", {**options, "imatrix": str(p)}).to_json() for p in (foreign[1], copy, other)]
    assert keys[0] == keys[1] != keys[2]
    assert str(tmp_path) not in str(keys)


def test_tensors_that_the_file_lacks_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    path.write_bytes(imatrix_bytes(Imatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 256)), np.ones(1))})))
    said: dict[str, Any] = {}
    work = pass_for("quantize", {"solver": "importance", "layout": "int4", "imatrix": str(path)})
    checkpoint = open_checkpoint(EMBER)
    work.apply(checkpoint, Run(report=said.__setitem__))
    assert set(said) == {i.name for i in checkpoint.linears()} - {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize(
    ("name", "width", "error", "message"),
    [
        ("blk.0.attn_q.weight", 96, Malformed, "96 input channels"),
        ("blk.99.attn_q.weight", 256, UsageError, "knows none"),
    ],
)
def test_matrices_of_other_models_are_refused_before_any_work(
    tmp_path: Path, name: str, width: int, error: type[Exception], message: str
) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(imatrix_bytes(Imatrix({name: Entry(np.ones((1, width)), np.ones(1))})))
    work = pass_for("quantize", {"solver": "importance", "layout": "int4", "imatrix": str(path)})
    with pytest.raises(error, match=message):
        work.requires(open_checkpoint(EMBER))


def test_only_the_importance_solver_takes_a_file(foreign: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="solver importance"):
        pass_for("quantize", {"solver": "gptq", "layout": "int4", "imatrix": str(foreign[1])})
    with pytest.raises(UsageError, match="there is no importance matrix"):
        pass_for("quantize", {"solver": "importance", "layout": "int4", "imatrix": "missing.gguf"})
