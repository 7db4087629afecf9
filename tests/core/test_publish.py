"""All or nothing at the output, whatever happens."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from tightship.errors import EnvironmentFailure, GateFailed, Malformed, UsageError
from tightship.manifest import rehash, write_manifest
from tightship.publish import Publication, environment_failures


def publish(output: Path, text: str, *, force: bool = False) -> None:
    with Publication(output, force=force) as publication:
        (publication.staging / "gguf").mkdir()
        (publication.staging / "gguf" / "x.gguf").write_text(text)
        digest = write_manifest(publication.staging, {})
        (publication.staging / "report.json").write_text(json.dumps({"manifest_sha256": digest}))
        (publication.staging / "report.md").write_text("")
        publication.publish()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_only_the_output_is_left(tmp_path: Path) -> None:
    publish(tmp_path / "new" / "out", "one")
    assert names(tmp_path / "new") == ["out"]
    assert names(tmp_path / "new" / "out") == ["gguf", "manifest.json", "report.json", "report.md"]


def test_an_existing_output_is_refused_and_replaced_by_force(tmp_path: Path) -> None:
    publish(tmp_path / "out", "one")
    with pytest.raises(UsageError, match="exists") as caught:
        publish(tmp_path / "out", "two")
    assert caught.value.exit_code == 2
    assert (tmp_path / "out/gguf/x.gguf").read_text() == "one"
    publish(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out/gguf/x.gguf").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_force_never_deletes_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(UsageError):
            publish(tmp_path / name, "one", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    assert names(tmp_path) == ["file", "home", "link"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def half(error: BaseException) -> None:
        with Publication(tmp_path / "out") as publication:
            (publication.staging / "x").write_text("half")
            raise error

    for error in (GateFailed("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(error)):
            half(error)
        assert names(tmp_path) == []


def test_two_builds_at_one_output(tmp_path: Path) -> None:
    with Publication(tmp_path / "out"), pytest.raises(EnvironmentFailure, match="another build"):
        publish(tmp_path / "out", "two")
    publish(tmp_path / "out", "two")
    assert names(tmp_path) == ["out"]


def test_rubbish_of_a_killed_build_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-1").mkdir()
    (tmp_path / ".out.partial-1" / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    (tmp_path / ".other.partial-1").mkdir()
    publish(tmp_path / "out", "one")
    assert names(tmp_path) == [".other.partial-1", "out"]


def test_an_output_moved_aside_by_a_killed_build_comes_back(tmp_path: Path) -> None:
    publish(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UsageError, match="exists"):
        publish(tmp_path / "out", "two")
    assert (tmp_path / "out/gguf/x.gguf").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_a_failing_rename_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "out", "one")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "bad disk", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="bad disk"):
        publish(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out/gguf/x.gguf").read_text() == "one"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG])
def test_what_the_system_says_becomes_exit_code_4(number: int) -> None:
    with (
        pytest.raises(EnvironmentFailure, match=r"building out: .*: model\.gguf") as caught,
        environment_failures("building out"),
    ):
        raise OSError(number, "x", "/somewhere/model.gguf")
    assert caught.value.exit_code == 4


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), environment_failures("building"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_rehash_sees_every_change(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fresh() -> None:
        publish(out, "content", force=True)

    publish(out, "content")
    assert [entry["path"] for entry in rehash(out)["files"]] == ["gguf/x.gguf"]
    changes = {
        "gguf/x.gguf was changed": lambda: (out / "gguf/x.gguf").write_text("c0ntent"),
        "gguf/x.gguf has another size": lambda: (out / "gguf/x.gguf").write_text("longer content"),
        "gguf/x.gguf is missing": (out / "gguf/x.gguf").unlink,
        "gguf/y is not in the manifest": lambda: (out / "gguf/y").write_text(""),
        "report.json is missing": (out / "report.json").unlink,
        "report.json belongs to another": lambda: (out / "manifest.json").write_text(
            (out / "manifest.json").read_text().replace("}\n", "} \n")
        ),
    }
    for words, change in changes.items():
        fresh()
        change()
        with pytest.raises(GateFailed, match=words) as caught:
            rehash(out)
        assert caught.value.exit_code == 1


def test_rehash_wants_a_published_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest\.json"):
        rehash(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "files": [{"path": "../../etc/passwd"}]}')
    with pytest.raises(Malformed):
        rehash(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 99, "files": []}')
    with pytest.raises(Malformed, match="99"):
        rehash(tmp_path)
