"""Builds as a whole, with the real exporters; the proof is replaced here (tests/e2e runs it)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tightship
from tightship import pipeline
from tightship.durable import sha256_file
from tightship.errors import EnvironmentFailure, GateFailed, Malformed, Unsupported, UsageError
from tightship.formats.safetensors_file import Header
from tightship.manifest import resolved_recipe
from tightship.passes import pass_for
from tightship.planning import make_plan
from tightship.recipe import Recipe, Step
from tightship.report import TargetReport, judge, not_run
from tightship.settings import Settings
from tightship.stages import Stage, make_stages
from tightship.target import sorted_files

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"
PRUNE = {"use": "prune", "with": {"sparsity": 0.5, "scope": "global"}}
QUANTIZE = {"use": "quantize", "with": {"layout": "int4"}}
BOTH = [{"to": "gguf"}, {"to": "safetensors"}]


def report_of(artifact: pipeline.Artifact, *checks: Any) -> TargetReport:
    return TargetReport(artifact.plan.target.id, 1, artifact.plan.bits_per_weight, 0.0, None, list(checks))


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., pipeline.Built]:
    """`tightship.build` of the embedded checkpoint, with directories of this test; every artifact passes unchecked."""
    monkeypatch.setattr(pipeline.Proofs, "of", lambda _, artifact: report_of(artifact))

    def run(*passes: dict[str, Any], output: str = "out", targets: Any = BOTH, **flags: Any) -> pipeline.Built:
        recipe = Recipe.from_json({"passes": list(passes), "targets": targets})
        options = {"work": tmp_path / "work", "threads": 1, **flags}
        return tightship.build(EMBER, output=tmp_path / output, recipe=recipe, **options)

    return run


def content(output: Path) -> dict[str, str]:
    return {n: sha256_file(output / n) for n in sorted_files(output) if not n.startswith("report.")}


def how_stages_were_had(built: pipeline.Built) -> list[str]:
    return [stage["state"] for stage in built.report["stages"]]


def test_what_is_published(build: Callable[..., pipeline.Built], tmp_path: Path) -> None:
    build(QUANTIZE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "work"]
    names = sorted_files(tmp_path / "out")
    assert {"manifest.json", "report.json", "report.md", "gguf/ember.gguf", "safetensors/model.safetensors"} <= set(
        names
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["files"]} == set(names) - {
        "manifest.json",
        "report.json",
        "report.md",
        "report.svg",
    }
    assert manifest["weights"].keys() == {"gguf"}  # the same integers: said once
    assert [t["weights"] for t in manifest["targets"]] == ["gguf", "gguf"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert not (tmp_path / "work" / "runs").joinpath("spool").exists()
    assert tightship.verify(tmp_path / "out").files == len(manifest["files"])


def test_the_plan_is_exact_and_reads_no_weight(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a plan reads no weight")

    recipe = Recipe.from_json({"source": str(EMBER), "passes": [PRUNE, QUANTIZE], "targets": BOTH})
    with monkeypatch.context() as patch:
        patch.setattr(Header, "read", refuse)
        plan = make_plan(recipe, Settings(work=tmp_path / "work"))
    assert not (tmp_path / "work").exists()
    assert [stage["stored"] for stage in plan.to_json()["stages"]] == [True, False]
    build(PRUNE, QUANTIZE)
    sizes = {t.plan.target.id: t.plan.file_bytes for t in plan.targets}
    assert sizes["gguf"] == (tmp_path / "out/gguf/ember.gguf").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "out/safetensors/model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "out/safetensors/model.safetensors").stat().st_size
    assert sizes["safetensors"] in (size, size - header)


def test_the_plan_counts_the_files_of_a_model_larger_than_memory(tmp_path: Path) -> None:
    recipe = Recipe.from_json({"source": str(EMBER), "targets": BOTH})
    fitting = make_plan(recipe, Settings(work=tmp_path))
    twice = 2 * fitting.source.float32_bytes  # the original and the compressed model
    larger = make_plan(recipe, Settings(work=tmp_path, max_memory=twice - 1))
    assert larger.scratch_bytes == fitting.scratch_bytes + twice
    assert larger.memory_bytes["proof"] == twice - 1 < fitting.memory_bytes["proof"]
    with pytest.raises(EnvironmentFailure, match="largest tensor twice"):
        make_plan(recipe, Settings(work=tmp_path, max_memory=1))


def test_an_existing_output_is_refused_and_a_forced_run_reuses_stages(
    build: Callable[..., pipeline.Built], tmp_path: Path
) -> None:
    assert how_stages_were_had(build(PRUNE, QUANTIZE)) == ["made", "streamed"]
    before = content(tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        build(PRUNE, QUANTIZE)
    assert content(tmp_path / "out") == before
    assert how_stages_were_had(build(PRUNE, QUANTIZE, force=True)) == ["reused", "streamed"]
    assert content(tmp_path / "out") == before
    assert how_stages_were_had(build(PRUNE, targets=[{"to": "gguf"}], output="other")) == ["reused"]


def test_files_of_options_start_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.imatrix").write_bytes(b"x")
    with_file = {"use": "quantize", "with": {"solver": "importance", "layout": "int4", "imatrix": "a.imatrix"}}
    recipe = Recipe.from_json({"passes": [with_file]}, base=tmp_path)
    assert make_stages(recipe)[0][0].work.imatrix == str(tmp_path / "a.imatrix")  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"a\.imatrix"):
        make_stages(Recipe.from_json({"passes": [with_file]}))


def test_files_are_recorded_by_name_and_digest(tmp_path: Path) -> None:
    for name in ("a.imatrix", "text.txt"):
        (tmp_path / name).write_bytes(b"content of it")
    options = {"solver": "importance", "imatrix": "a.imatrix"}
    data = {
        "calibration": {"text": "text.txt"},
        "passes": [
            {"use": "recover", "inputs": {"data": "text.txt", "teacher": "source"}, "with": {"method": "blockwise"}}
        ],
        "targets": [{"to": "gguf", "scheme": "q4_0", "with": options}],
        "source": str(EMBER),
    }
    recipe = Recipe.from_json(data, base=tmp_path)
    solve = Stage(Step("quantize", "scheme"), pass_for("quantize", {**options, "layout": "q4_0"}, resolve=recipe.path))
    resolved = resolved_recipe(recipe, make_stages(recipe)[0], {"gguf-q4_0": solve})
    text = json.dumps(resolved)
    assert str(tmp_path) not in text
    digest = hashlib.sha256(b"content of it").hexdigest()
    assert resolved["calibration"]["text"] == {"name": "text.txt", "sha256": digest}
    assert resolved["passes"][0]["inputs"] == {"data": {"name": "text.txt", "sha256": digest}, "teacher": "source"}
    assert resolved["targets"][0]["with"]["imatrix"] == {"name": "a.imatrix", "sha256": digest}


def test_a_schemes_solving_is_a_stage_of_the_report(build: Callable[..., pipeline.Built]) -> None:
    built = build(targets=[{"to": "gguf", "scheme": "q4_0"}])
    assert [(stage["id"], stage["use"]) for stage in built.report["stages"]] == [("scheme gguf-q4_0", "quantize")]


def test_a_damaged_stage_is_made_again(build: Callable[..., pipeline.Built], tmp_path: Path) -> None:
    build(PRUNE, QUANTIZE)
    before = content(tmp_path / "out")
    stored = next((tmp_path / "work" / "stages").glob("*/weights/*.safetensors"))
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(bytes(data))
    assert how_stages_were_had(build(PRUNE, QUANTIZE, force=True)) == ["redone", "streamed"]
    assert content(tmp_path / "out") == before


def test_sparsity_survives_into_every_target(build: Callable[..., pipeline.Built], tmp_path: Path) -> None:
    import gguf
    import numpy as np

    build(PRUNE, QUANTIZE)
    reader = gguf.GGUFReader(tmp_path / "out/gguf/ember.gguf")
    linears = [t for t in reader.tensors if t.name.startswith("blk.") and "norm" not in t.name]
    values = [gguf.quants.dequantize(t.data, t.tensor_type) for t in linears]
    assert sum(int((v == 0).sum()) for v in values) >= round(0.5 * sum(v.size for v in values))
    assert all(np.isfinite(v).all() for v in values)


def test_one_target_merges_factors_and_another_keeps_them(build: Callable[..., pipeline.Built], tmp_path: Path) -> None:
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    low_rank = {"use": "low-rank", "with": {"rank": 16, "dtype": "f32"}}
    merged, kept = {"to": "gguf", "with": {"merge": True}}, {"to": "safetensors"}
    with pytest.raises(Unsupported, match="made of factors"):
        build(low_rank, targets=[{"to": "gguf"}, kept])
    built = build(low_rank, targets=[merged, kept])
    assert [stage["id"] for stage in built.report["stages"]] == ["low-rank", "merge gguf"]
    factors = load_file(tmp_path / "out/safetensors/factored.safetensors")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out/gguf/ember.gguf").tensors}
    for block in range(2):
        left, right = (factors[f"model.layers.{block}.mlp.down_proj.{side}.weight"] for side in ("left", "right"))
        np.testing.assert_allclose(tensors[f"blk.{block}.ffn_down.weight"], (left @ right).numpy(), atol=1e-6)
    with pytest.raises(UsageError, match="no weight is made of factors"):
        build(targets=[merged], output="dense")
    with pytest.raises(UsageError, match="true or false"):
        build(low_rank, targets=[{"to": "gguf", "with": {"merge": "yes"}}], output="dense")


SCRIPT = """
import sys, tightship
from tightship import pipeline
from tightship.report import TargetReport
pipeline.Proofs.of = lambda self, a: TargetReport(a.plan.target.id, 0, 0.0, 0.0, None, [])
recipe = tightship.Recipe.from_json({recipe!r})
tightship.build({source!r}, output=sys.argv[1], recipe=recipe, work=sys.argv[2], threads=int(sys.argv[3]))
"""


CONTAINERS = [
    [{"to": "gguf", "scheme": "q4_0"}, {"to": "safetensors", "scheme": "w4a16"}, {"to": "safetensors"}],
    pytest.param([{"to": "onnx", "scheme": "int4"}, {"to": "onnx"}], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("targets", CONTAINERS)
def test_the_same_bytes_whatever_the_directory_hash_seed_and_threads(tmp_path: Path, targets: list[Any]) -> None:
    recipe = {"passes": [PRUNE], "targets": targets}
    found = []
    for number, (seed, threads) in enumerate((("0", "1"), ("4321", "2"))):
        place = tmp_path / f"place-{number}" / ("x" * number * 9)
        place.mkdir(parents=True)
        script = SCRIPT.format(recipe=recipe, source=str(EMBER) if number else os.path.relpath(EMBER, place))
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, "out", "work", threads],
            cwd=place,
            env={**os.environ, "PYTHONHASHSEED": seed, "HOME": str(place), "TZ": f"UTC{number}"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(content(place / "out"))
    assert found[0] == found[1]
    assert len(found[0]) >= 8


def failing(kind: str) -> Callable[[Any, pipeline.Artifact], TargetReport]:
    def of(_: Any, artifact: pipeline.Artifact) -> TargetReport:
        target = artifact.plan.target.id
        if kind == "fail":
            check = judge(
                target=target, runtime="llama.cpp", kind="graph", metric="rel_l2", value=0.5, op="<=", threshold=1e-3
            )
        else:
            check = not_run(target=target, runtime="llama.cpp", kind="graph", metric="outputs", reason="not installed")
        return report_of(artifact, check)

    return of


@pytest.mark.parametrize("kind", ["fail", "not_run"])
def test_a_failed_gate_publishes_nothing_and_keeps_the_report(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(pipeline.Proofs, "of", failing(kind))
    with pytest.raises(GateFailed) as caught:
        build(QUANTIZE, targets=[{"to": "gguf"}])
    assert caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    kept = Path(str(caught.value.hint).split(" is in ")[1].split(";")[0])
    assert kept.parent.parent == tmp_path / "work" / "runs"
    assert json.loads(kept.with_suffix(".json").read_text())["verdict"] == "fail"
    assert "gguf/llama.cpp/graph" in str(caught.value)


def test_a_missing_proof_can_be_accepted_and_a_failed_one_cannot(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.Proofs, "of", failing("not_run"))
    build(QUANTIZE, targets=[{"to": "gguf"}], accept_unproven=["llama.cpp"])
    assert json.loads((tmp_path / "out/manifest.json").read_text())["accepted_unproven"] == ["llama.cpp"]
    monkeypatch.setattr(pipeline.Proofs, "of", failing("fail"))
    with pytest.raises(GateFailed):
        build(QUANTIZE, targets=[{"to": "gguf"}], accept_unproven=["llama.cpp"], output="second")


def test_runtimes_accepted_unproven_must_exist(build: Callable[..., pipeline.Built]) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'llama\.cpp'"):
        build(QUANTIZE, accept_unproven=["llama-cpp"])


@pytest.mark.parametrize("what", ["plan", "pass prune", "write gguf", "write safetensors"])
def test_ctrl_c_leaves_nothing(build: Callable[..., pipeline.Built], tmp_path: Path, what: str) -> None:
    def interrupt(doing: str, _done: int, _total: int) -> None:
        if what in (doing, "plan"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(PRUNE, QUANTIZE, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    events = [json.loads(line) for line in next((tmp_path / "work").glob("runs/*/run.jsonl")).read_text().splitlines()]
    assert events[-1]["event"] == "end"
    assert events[-1]["outcome"] == "KeyboardInterrupt"
    build(PRUNE, QUANTIZE)


def test_a_full_disk_at_every_flush(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Nth fsync fails, for every N that a build has: the old output stays, and nothing lies beside it."""
    flush, count, fatal = os.fsync, 0, 0

    def fail(handle: int) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fail)
    build(QUANTIZE, targets=[{"to": "safetensors"}])
    before, flushes = content(tmp_path / "out"), count
    assert flushes > 8
    for number in range(1, flushes + 1):
        count, fatal = 0, number
        with pytest.raises(EnvironmentFailure, match="disk is full"):
            build(PRUNE, targets=[{"to": "safetensors"}], force=True, seed=number)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "work"]
        assert content(tmp_path / "out") == before


def test_files_beyond_the_allowed_size(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: a real short write, in the middle of a weight file."""
    recipe = {"passes": [QUANTIZE], "targets": [{"to": "gguf"}]}
    script = SCRIPT.format(recipe=recipe, source=str(EMBER))
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "out", "work", "1"],
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "EnvironmentFailure" in done.stderr
    assert "beyond the allowed size" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_too_little_disk_is_told_before_any_work(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFailure, match="5 bytes free"):
        build(PRUNE, QUANTIZE)
    assert not (tmp_path / "work" / "stages").exists()


def test_an_unwritable_directory(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *arguments: Any, **named: Any) -> None:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(EnvironmentFailure, match="permission is denied"):
        build(QUANTIZE)
    assert list(tmp_path.iterdir()) == []


def test_refusals_come_before_any_work(build: Callable[..., pipeline.Built], tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        build({"use": "quantize", "with": {"layout": "int4-g96"}})
    assert caught.value.tensor
    with pytest.raises(UsageError, match="grid"):
        build(QUANTIZE, PRUNE)
    with pytest.raises(UsageError, match="would have no effect"):
        build(targets=[{"to": "gguf", "with": {"solver": "rtn"}}])
    with pytest.raises(Unsupported, match="undo the pruning"):
        build(PRUNE, targets=[{"to": "gguf", "scheme": "q4_k_m"}])
    assert not (tmp_path / "work" / "stages").exists()
    assert not (tmp_path / "out").exists()


def test_a_bad_order_can_be_allowed(build: Callable[..., pipeline.Built]) -> None:
    built = build(QUANTIZE, PRUNE, allow_order=True, targets=[{"to": "safetensors"}])
    assert how_stages_were_had(built) == ["streamed", "made"]


def test_verify_makes_the_weights_again(
    build: Callable[..., pipeline.Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(PRUNE, targets=[{"to": "gguf", "scheme": "q4_0"}, {"to": "safetensors"}])
    verified = tightship.verify(tmp_path / "out", against=EMBER, work=tmp_path / "work")
    assert verified.report is not None
    assert [t["id"] for t in verified.report["targets"]] == ["gguf-q4_0", "safetensors"]
    monkeypatch.setattr(pipeline.Proofs, "of", failing("fail"))
    with pytest.raises(GateFailed, match=r"llama\.cpp/graph"):
        tightship.verify(tmp_path / "out", against=EMBER, work=tmp_path / "work")


def test_verify_against_another_source(build: Callable[..., pipeline.Built], tmp_path: Path) -> None:
    import shutil

    build(QUANTIZE, targets=[{"to": "gguf"}])
    shutil.copytree(EMBER, tmp_path / "ember")
    weights = bytearray((tmp_path / "ember/model.safetensors").read_bytes())
    weights[-2] ^= 1
    (tmp_path / "ember/model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(GateFailed, match="other files"):
        tightship.verify(tmp_path / "out", against=tmp_path / "ember", work=tmp_path / "work")


def test_nan_in_the_source_names_the_tensor(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.torch import load_file, save_file

    source = tmp_path / "ember"
    source.mkdir()
    for file in EMBER.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 3] = np.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Malformed) as caught:
        tightship.build(source, output=tmp_path / "out", quantize="int4", to=["gguf"], work=tmp_path / "work")
    assert caught.value.tensor == name
    assert not (tmp_path / "out").exists()


def test_import_is_light() -> None:
    code = "import sys, tightship; print([m for m in ('numpy', 'torch', 'yaml', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert callable(tightship.build)
    with pytest.raises(AttributeError):
        tightship.no_such_thing  # noqa: B018


def kill_points(tmp_path: Path, step: int) -> dict[str, Any]:
    script = Path(__file__).with_name("kill_points.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(EMBER), str(tmp_path), str(step)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)["build"]
    assert found["wrong"] == []
    assert found["killed"] == found["events"] // step
    assert found["states"].keys() <= {"nothing", "whole"}
    return found


def test_kill_9_now_and_then(tmp_path: Path) -> None:
    assert kill_points(tmp_path, 11)["events"] > 80


@pytest.mark.slow
def test_kill_9_at_every_third_event(tmp_path: Path) -> None:
    assert kill_points(tmp_path, 3)["events"] > 80
