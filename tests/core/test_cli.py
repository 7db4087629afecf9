"""The command line's manners: exit codes, one JSON object, data on stdout, light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMBER = ROOT / "examples" / "ember"


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tightship", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.mark.parametrize("command", [[], ["build"], ["plan"], ["inspect"], ["verify"], ["doctor"], ["store"]])
def test_help_leads_with_examples_or_says_what_it_does(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    if not command or command[0] in {"build", "plan", "inspect", "verify"}:
        assert done.stdout.index("Examples:") < done.stdout.index("Options:")


def test_every_command_and_option_stands_in_the_contract() -> None:
    from tightship.cli import cli

    contract = (ROOT / "docs" / "contract.md").read_text()
    for name, command in cli.commands.items():
        assert f"tightship {name}" in contract, name
        for parameter in command.params:
            for option in getattr(parameter, "opts", []):
                if option.startswith("--") and name in {"build", "plan"} and option not in {"--help", "--output"}:
                    assert option in contract, f"{name} {option}"


def test_a_bad_flag_is_usage_and_one_json_object() -> None:
    done = run("build", "--no-such-flag", "--json")
    assert done.returncode == 2
    body = json.loads(done.stdout)
    assert body["exit_code"] == 2
    assert body["error"]["code"] == "usage"


def test_a_fault_of_ours_is_one_json_object_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tightship import inspection
    from tightship.cli import main

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(inspection, "inspect", broken)
    assert main(["inspect", str(EMBER), "--json"]) == 1
    written = capsys.readouterr()
    assert json.loads(written.out)["error"]["code"] == "internal"
    assert "RuntimeError: a bug" in written.err


def test_build_without_output_is_usage() -> None:
    done = run("build", str(EMBER), "--to", "gguf")
    assert done.returncode == 2
    assert "-o DIR" in done.stderr
    assert done.stdout == ""


def test_inspect_counts_what_is_there() -> None:
    done = run("inspect", str(EMBER), "--json")
    assert done.returncode == 0
    (file,) = json.loads(done.stdout)["result"]["files"]
    # 1024 x 256 embeddings, 2 layers of 196608 attention + 589824 feed-forward + 512 norm weights, and the last norm
    assert file["weights"] == 1024 * 256 + 2 * (196608 + 589824 + 512) + 256
    assert file["bits_per_weight"] == 16


def test_inspect_of_nothing_is_usage(tmp_path: Path) -> None:
    assert run("inspect", str(tmp_path / "absent")).returncode == 2
    assert run("inspect", str(tmp_path)).returncode == 2


def test_inspect_of_a_broken_file_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    done = run("inspect", str(tmp_path))
    assert done.returncode == 5
    assert "model.safetensors" in done.stderr


def test_import_and_inspect_are_light() -> None:
    code = (
        "import sys, tightship, tightship.cli; from tightship.inspection import inspect; from pathlib import Path;"
        f"inspect(Path({str(EMBER)!r}));"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_doctor_reports_each_container() -> None:
    done = run("doctor", "--json")
    result = json.loads(done.stdout)["result"]
    assert set(result["targets"]) == {"gguf", "onnx", "safetensors"}
    assert done.returncode == (0 if result["healthy"] else 4)


def test_shrunk_and_expanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tightship.cli import main

    source = EMBER / "model.safetensors"
    assert main(["shrink", str(source), "-o", str(tmp_path / "s.safetensors"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["source_bytes"] == source.stat().st_size
    assert main(["expand", str(tmp_path / "s.safetensors"), "-o", str(tmp_path / "m.safetensors")]) == 0
    assert (tmp_path / "m.safetensors").read_bytes() == source.read_bytes()
    assert main(["expand", str(source), "-o", str(tmp_path / "n.safetensors")]) == 5
    assert "shrink" in capsys.readouterr().err
