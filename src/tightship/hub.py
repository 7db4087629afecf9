"""Hub ids: the files of one commit, fetched through huggingface_hub into its own cache, and checked.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean there. A name is resolved to a commit
first and every file is fetched from that commit, so that a repository that changes meanwhile cannot mix two states.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightship.digests import digest_file
from tightship.errors import EnvironmentFailure, UsageError
from tightship.sidecars import listed
from tightship.target import Progress

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


def download(repository: str, revision: str | None, progress: Progress) -> tuple[Path, str]:
    """The directory of one commit of `org/name`, and the commit.

    Raises:
        UsageError: no such repository or revision.
        EnvironmentFailure: no network, access denied, a download broken off, or bytes that are not those announced.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        with _translated(repository, revision):
            cached = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
        return cached, cached.name
    endpoint = os.environ.get("HF_ENDPOINT")
    with _translated(repository, revision):
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
    commit = str(info.sha)
    siblings = {s.rfilename: s for s in info.siblings or []}
    wanted = wanted_files(siblings)
    folder: Path | None = None
    for done, name in enumerate(wanted):
        progress(f"download {name}", done, len(wanted))
        with _translated(repository, revision):
            path = Path(huggingface_hub.hf_hub_download(repository, name, revision=commit, endpoint=endpoint))
        _check(path, siblings[name], repository)
        folder = folder or Path(str(path).removesuffix(name))
    if folder is None:
        raise UsageError(f"{repository} holds no config.json and no weights", hint="is it a model repository?")
    return folder, commit


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files: config, tokenizer, and weights (safetensors where there are any, else `.bin`)."""
    names = list(names)
    weights = _matching(names, _SAFETENSORS) or _matching(names, _BIN)
    return [*listed(names), *weights]


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))


def _check(path: Path, sibling: Any, repository: str) -> None:
    size, digest = digest_file(path)
    announced = sibling.lfs.sha256 if sibling.lfs else None
    if (sibling.size is not None and size != sibling.size) or (announced and digest != announced):
        raise EnvironmentFailure(
            f"{sibling.rfilename} of {repository} came as {size} bytes, sha256 {digest[:12]}...; "
            f"the hub announces {sibling.size} bytes, sha256 {(announced or 'unknown')[:12]}...",
            hint=f"delete {path.resolve().name} from the hub cache and fetch again",
        )


@contextmanager
def _translated(repository: str, revision: str | None) -> Iterator[None]:
    """Failures of the client as ours."""
    from huggingface_hub import errors

    where = repository + (f" at revision {revision}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise EnvironmentFailure(
            f"{repository} is gated and access was refused", hint="accept its conditions on the hub, then set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"the hub has no {where}, or it is private", hint="check the name; for a private one set HF_TOKEN"
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        raise EnvironmentFailure(
            f"fetching {where} failed: {str(error).strip().splitlines()[0]:.200}",
            hint="run it again: what has arrived is kept; without a network give a local directory",
        ) from error
