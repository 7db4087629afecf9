"""`did you mean`: one wording for every misspelt word of the contract."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause to append to an error message, or an empty string where nothing is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
