"""The form of a rule, and the list of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tightship.validators.lint.artifact import Artifact

Effect = Literal["loud", "quiet", "note"]
Check = Callable[[Artifact], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Finding:
    """`where` is a tensor, a module or a key; `source` is where the runtime's behaviour was read or measured."""

    rule: str
    runtime: str
    effect: Effect
    artifact: str
    where: str
    message: str
    source: str


@dataclass(frozen=True)
class Rule:
    """One thing that some runtimes demand or ignore in files of one container."""

    name: str
    container: str
    runtimes: tuple[str, ...]
    effect: Effect
    source: str
    check: Check

    def findings(self, artifact: Artifact, runtime: str) -> Iterator[Finding]:
        """What the rule finds in an artifact."""
        for where, message in self.check(artifact):
            yield Finding(self.name, runtime, self.effect, artifact.name, where, message, self.source)


RULES: list[Rule] = []


def rule(name: str, container: str, runtimes: str, effect: Effect, source: str) -> Callable[[Check], Check]:
    """Register a check: it yields (where, message) for each violation. `runtimes` are separated by spaces."""

    def register(check: Check) -> Check:
        RULES.append(Rule(name, container, tuple(runtimes.split()), effect, source, check))
        return check

    return register
