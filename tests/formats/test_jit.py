"""The kernels' cache: what is found in it, and what is not."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tightship.formats import jit


def run(folder: Path, name: str = "user") -> str:
    """Output of `print(user.twice(3.0), hits)` in a fresh process, with the modules of `folder`."""
    code = f"""
        import sys
        sys.path.insert(0, {str(folder)!r})
        import {name} as user
        print(user.outer(3.0), sum(user.outer.stats.cache_hits.values()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from tightship.formats.jit import kernel\n\n\n@kernel\ndef outer(x):\n    return 2 * x\n"
    )
    assert run(tmp_path) == "6.0 0"
    assert run(tmp_path) == "6.0 1"


def test_other_sources_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = jit._Files(str(tmp_path), "module.function-1.py311", "module.py")
    monkeypatch.setattr(jit, "_sources", lambda _: "aaaa")
    files.save(("float32",), {"code": 1})
    files.save(("int8",), {"code": 2})
    assert files.load(("float32",)) == {"code": 1}
    assert files.load(("int8",)) == {"code": 2}
    monkeypatch.setattr(jit, "_sources", lambda _: "bbbb")
    assert files.load(("float32",)) is None
    files.save(("float32",), {"code": 3})
    assert files.load(("float32",)) == {"code": 3}
    assert len(list(tmp_path.iterdir())) == 1  # the stale ones are gone


def test_kernels_release_the_gil_and_do_not_fuse() -> None:
    @jit.kernel
    def fused(a, b, c):
        return a * b + c

    a, c = np.float32(1 + 2**-12), np.float32(-1 - 2**-11)
    assert fused(a, a, c) == 0  # 2^-24 if fused
    assert fused.targetoptions["nogil"]
    assert not fused.targetoptions.get("fastmath")
