"""What calibrated passes read: the documents of a file, or text that the source writes itself, as a stage of its own.

It is the source that writes, once for all passes of a build. The stage keeps one small file in the store:

    written.npy    int64 little-endian, (windows, length): token ids

The sha256 of those ids, row by row, stands in `report.json`; of a text file it is that of the file. A recipe can pin it
(`calibration: {text: self, sha256: ...}`): what another machine or version would write differently then fails.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.durable import sha256_file
from tightship.errors import GateFailed
from tightship.recipe import SELF, Calibration
from tightship.store import stage_key

if TYPE_CHECKING:
    from tightship.checkpoint import Checkpoint
    from tightship.stages import State, Workshop

REVISION = 1
FILE = "written.npy"


@dataclass(frozen=True)
class Reading:
    """What is read: `texts` or, where the source wrote, windows of ids; its digest; the stage that wrote, if any."""

    texts: tuple[str, ...] = ()
    written: tuple[np.ndarray, ...] = ()
    digest: str = ""
    log: tuple[dict[str, Any], ...] = ()


def read(shop: Workshop, conditions: dict[str, Any]) -> Reading:
    """The calibration text of a build; the source writes it where the recipe names none.

    Raises:
        UsageError: a file that is not there.
        GateFailed: the text is not the one that the recipe pins.
        Malformed, Unsupported: see `tightship.texts`.
    """
    from tightship.texts import read_documents

    asked = shop.recipe.calibration or Calibration()
    source = shop.results["source"]
    if asked.text == SELF:
        return _written(shop, source, asked, conditions)
    path = Path(shop.recipe.path(asked.text))
    texts = read_documents(path, source.checkpoint)
    digest = sha256_file(path)
    _check_pin(path.name, asked, digest)
    rendered = hashlib.sha256(chr(0).join(texts).encode()).hexdigest()
    return Reading(texts, digest=f"{rendered} {_amount(asked)}")


def _written(shop: Workshop, source: State, asked: Calibration, conditions: dict[str, Any]) -> Reading:
    from tightship.modelview import ModelView
    from tightship.texts import generated_windows

    settings = shop.settings
    step = {"use": "write-text", "revision": REVISION, "with": {"tokens": asked.tokens, "sequence": asked.sequence}}
    key = stage_key(source.key, step, inputs={}, seed=shop.recipe.seed, conditions=conditions)
    entry: dict[str, Any] = {"id": "calibration text", "use": "write-text", "figures": {}}

    def write(scratch: Path) -> Checkpoint:  # noqa: ARG001 - a stage gets one; writing is not resumed
        view = ModelView(source.checkpoint, threads=settings.threads, device=settings.device)
        ids = np.stack(
            generated_windows(view, tokens=asked.tokens, sequence=asked.sequence, seed=shop.recipe.seed)
        ).astype("<i8")  # fmt: skip
        entry["figures"] = {"self": {"tokens": int(ids.size), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}}
        stream = io.BytesIO()
        np.save(stream, ids, allow_pickle=False)
        return source.checkpoint.replace(files={**source.checkpoint.files, FILE: stream.getvalue()})

    kept, how, entry = shop.store.get_or_make(key, source.checkpoint, write, about=entry)
    ids = np.load(io.BytesIO(kept.files[FILE]), allow_pickle=False)
    digest = str(entry["figures"]["self"]["sha256"])
    _check_pin("the text that the model writes", asked, digest)
    return Reading(
        written=tuple(ids), digest=f"{digest} {_amount(asked)}", log=({**entry, "state": how, "key": key},)
    )  # fmt: skip


def _amount(asked: Calibration) -> str:
    return f"tokens={asked.tokens} sequence={asked.sequence}"


def _check_pin(what: str, asked: Calibration, digest: str) -> None:
    if asked.sha256 not in (None, digest):
        raise GateFailed(
            f"{what} has sha256 {digest}, and the recipe pins {asked.sha256}",
            hint="calibrate on the pinned text, or change `sha256` under `calibration`",
        )
