"""A runtime that crashes, hangs, raises or eats memory is an answer, not our death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from tightship.errors import UsageError
from tightship.validators.runtimes import child
from tightship.validators.runtimes.child import Limits, RuntimeDied, RuntimeMissing, run_child

FAKE = """
import os, subprocess, sys, time
import numpy as np
from tightship.errors import Malformed, Unsupported

def run(job, arrays):
    what = job["what"]
    if what == "double":
        print("to stdout")
        return {"sum": float(sum(a.sum() for a in arrays.values()))}, {k: 2 * a for k, a in arrays.items()}
    if what == "abort":
        print("GGML_ASSERT failed", file=sys.stderr)
        os.abort()
    if what == "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", job["mark"]])
        time.sleep(60)
    if what == "raise":
        raise KeyError("no such output")
    if what == "tensor":
        raise Malformed("has no data", tensor="blk.0.attn_q.weight")
    if what == "declines":
        raise Unsupported("this runtime loads no such quantization")
    if what == "allocate":
        return {"big": len(bytearray(1 << 40))}, {}
    if what == "environment":
        return dict(os.environ), {}
    if what == "exit":
        os._exit(0)
"""


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_runtime.py").write_text(FAKE)
    (tmp_path / "needs_a_package.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.setitem(child.RUNTIMES, "fake", "fake_runtime")
    monkeypatch.setitem(child.RUNTIMES, "lacking", "needs_a_package")
    monkeypatch.setattr(child, "_ENVIRONMENT", (*child._ENVIRONMENT, "PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def ask(what: str, *, name: str = "fake", **limits: object) -> tuple[dict, dict]:
    return run_child(name, {"what": what}, {}, limits=Limits(**limits))


def test_answer_and_arrays_come_back() -> None:
    arrays = {"input_ids": np.arange(6, dtype=np.int64).reshape(2, 3), "mask": np.ones((2, 3), np.float32)}
    result, out = run_child("fake", {"what": "double"}, arrays, limits=Limits())
    assert result == {"sum": 21.0}
    np.testing.assert_array_equal(out["input_ids"], arrays["input_ids"] * 2)
    assert out["mask"].dtype == np.float32


def test_abort_is_reported_with_its_last_words() -> None:
    with pytest.raises(RuntimeDied, match=r"SIGABRT.*GGML_ASSERT failed"):
        ask("abort")


def test_hanging_runtime_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = f"orphan-of-{tmp_path}"
    with pytest.raises(RuntimeDied, match="within 3 s"):
        run_child("fake", {"what": "hang", "mark": mark}, {}, limits=Limits(seconds=3))
    assert not _running(mark)


def _running(mark: str) -> bool:
    listing = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return any(line.endswith(mark) for line in listing.splitlines())


def test_exception_is_quoted() -> None:
    with pytest.raises(RuntimeDied, match="KeyError: 'no such output'"):
        ask("raise")


def test_tensor_of_a_typed_failure_survives() -> None:
    with pytest.raises(RuntimeDied, match="has no data") as caught:
        ask("tensor")
    assert caught.value.tensor == "blk.0.attn_q.weight"


def test_too_much_memory_is_refused_to_the_child() -> None:
    with pytest.raises(RuntimeDied, match="out of memory under its limit of 4294967296"):
        ask("allocate", memory=1 << 32)


def test_missing_package_and_declined_artifact_did_not_run() -> None:
    with pytest.raises(RuntimeMissing, match="no_such_package_anywhere"):
        ask("double", name="lacking")
    with pytest.raises(RuntimeMissing, match="no such quantization"):
        ask("declines")


def test_silent_exit_is_not_success() -> None:
    with pytest.raises(RuntimeDied, match="code 0 and no answer"):
        ask("exit")


def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "secret")
    found, _ = ask("environment", threads=3)
    assert "secret" not in found.values()
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["HOME"] != os.environ.get("HOME")


def test_unknown_runtime() -> None:
    with pytest.raises(UsageError, match="known: llama_cpp"):
        run_child("tensorflow", {}, {}, limits=Limits())


def test_nothing_stays_behind(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(RuntimeDied):
        ask("abort", scratch=scratch)
    assert list(scratch.iterdir()) == []


def test_interrupt_ends_the_child(tmp_path: Path) -> None:
    """Ctrl-C in the parent: the child's whole group is gone, and so is the exchange directory."""
    mark = f"orphan-of-{tmp_path}"
    script = textwrap.dedent(f"""
        from pathlib import Path
        from tightship.validators.runtimes import child
        child.RUNTIMES["fake"] = "fake_runtime"
        child._ENVIRONMENT = (*child._ENVIRONMENT, "PYTHONPATH")
        job = {{"what": "hang", "mark": {mark!r}}}
        child.run_child("fake", job, {{}}, limits=child.Limits(scratch=Path({str(tmp_path)!r})))
    """)
    parent = subprocess.Popen([sys.executable, "-P", "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not _running(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _running(mark)
    parent.send_signal(signal.SIGINT)
    parent.wait(timeout=30)
    assert not _running(mark)
    assert not list(tmp_path.glob("tightship-*"))
