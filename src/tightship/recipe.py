"""What to do and what to make of it: the recipe of docs/contract.md, from a YAML file, from flags, or from both.

Flags win over the environment (`TIGHTSHIP_*`, read in `settings.py`), which wins over the recipe, which wins over
defaults. `recipe.schema.json` is the published JSON Schema; options of passes are checked by the passes themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tightship.errors import UsageError
from tightship.suggest import did_you_mean
from tightship.target import CONTAINERS, Target

_PLAIN_SCHEMES = frozenset({"f32", "f16", "bf16", "fp32", "fp16"})
_SUPER_BLOCKS = re.compile(r"_k|^iq(?!4_nl)|^tq")  # layouts of 256 columns a block
_MAKES_A_GRID = frozenset({"quantize", "prune-quantize", "qat"})
SELF = "self"


@dataclass(frozen=True)
class Calibration:
    """Text that calibrated passes see: a file, or `self` for text that the model makes; `tokens` of it in all.

    `sha256` pins the text. `allow` names fallbacks that do not fail the build: `unreached` (a matrix that no token
    reached is rounded to nearest), `singular` (GPTQ without an inverse becomes importance search).
    """

    text: str = SELF
    tokens: int = 65536
    sequence: int = 512
    sha256: str | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow", tuple(self.allow))

    def to_json(self) -> dict[str, Any]:
        """As a recipe writes it."""
        said = dataclasses.asdict(self) | {"allow": list(self.allow)}
        return {key: value for key, value in said.items() if value not in (None, [])}


@dataclass(frozen=True)
class Step:
    """One pass of a recipe: `use` it `with` these options; later steps call its result `id`."""

    use: str
    id: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A build, apart from where it runs.

    Attributes:
        source: path or hub id, `@revision` included.
        base: directory that paths of the recipe are relative to; None for the working directory.
        solver: `--solver`, for every quantizing scheme and `--quantize`; None chooses by whether text is given.
    """

    source: str | None = None
    seed: int = 0
    threads: int | None = None
    calibration: Calibration | None = None
    passes: tuple[Step, ...] = ()
    targets: tuple[Target, ...] = ()
    gates: Mapping[str, Any] = field(default_factory=dict)
    solver: str | None = None
    base: Path | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe.

        Raises:
            UsageError: no such file, or not a recipe; the message names the key and suggests the nearest.
        """
        from tightship.strict_yaml import load

        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise UsageError(f"there is no recipe {file}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{file.name} is not a recipe: it is not UTF-8 text") from error
        return cls.from_json(load(text, file.name), name=file.name, base=file.resolve().parent)

    @classmethod
    def from_json(cls, data: Any, *, name: str = "recipe", base: Path | None = None) -> Recipe:
        """From the parsed form. Raises `UsageError` as `from_file`."""
        _check_schema(data, name)
        plain = {key: data[key] for key in ("source", "seed", "threads", "gates") if key in data}
        calibration = Calibration(**data["calibration"]) if "calibration" in data else None
        recipe = cls(
            **plain,
            calibration=calibration,
            passes=_steps(data.get("passes", []), name),
            targets=tuple(
                Target(t["to"], _scheme(t.get("scheme")), dict(t.get("with", {}))) for t in data.get("targets", [])
            ),
            base=base,
        )
        recipe._check(name)
        return recipe

    @classmethod
    def from_flags(cls, source: str, **flags: Any) -> Recipe:
        """A recipe made of flags alone; they are those of `override`."""
        return cls().override(source=source, **flags)

    def override(
        self,
        *,
        source: str | None = None,
        quantize: str | None = None,
        include: Sequence[str] = (),
        to: Sequence[str] = (),
        solver: str | None = None,
        calibration: str | None = None,
        seed: int | None = None,
        threads: int | None = None,
    ) -> Recipe:
        """This recipe with what flags say in place of what it says. `quantize` adds a pass behind those there are.

        Raises:
            UsageError: a quantizing scheme after quantization, a target twice, a misspelt container.
        """
        changes: dict[str, Any] = {"source": source, "seed": seed, "threads": threads, "solver": solver}
        if calibration is not None:
            known = self.calibration or Calibration()
            changes["calibration"] = dataclasses.replace(known, text=_absolute(calibration), sha256=None)
        if to:
            changes["targets"] = tuple(parse_target(word) for word in to)
        if include and quantize is None:
            raise UsageError(
                "--include goes with --quantize", hint="in a recipe, write include under the target's with"
            )
        if quantize is not None:
            options: dict[str, Any] = {"layout": quantize, **({"include": list(include)} if include else {})}
            taken = {step.id for step in self.passes}
            number = next(n for n in range(1, len(taken) + 2) if _numbered("quantize", n) not in taken)
            changes["passes"] = (*self.passes, Step("quantize", _numbered("quantize", number), {}, options))
        if source is not None:
            changes["source"] = source if self.base is None else _absolute(source)
        recipe = dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})
        recipe._check("flags")
        return recipe

    def default_solver(self) -> str:
        """What quantizes where nothing is said: `--solver`; else `importance` with calibration text, `rtn` without."""
        return self.solver or ("importance" if self.calibration else "rtn")

    def width_multiple(self) -> int:
        """What widths of matrices should be multiples of: a K-quant's block where one is asked for, else 32."""
        words = [t.scheme or "" for t in self.targets if t.container == "gguf"]
        words += [str(step.options.get("layout", "")) for step in self.passes]
        return 256 if any(_SUPER_BLOCKS.search(word.lower()) for word in words) else 32

    def path(self, text: str) -> str:
        """A path of the recipe as one that can be opened: relative ones start at the recipe's directory.

        A text that names nothing there comes back as it is (it may be a hub id).
        """
        if self.base is None or Path(text).is_absolute():
            return text
        here = self.base / text
        return str(here) if here.exists() else text

    def to_json(self) -> dict[str, Any]:
        """The parsed form again, defaults spelt out; `from_json` is its inverse, but for `base` and `solver`."""
        calibration = {"calibration": self.calibration.to_json()} if self.calibration else {}
        return {
            **({"source": self.source} if self.source else {}),
            "seed": self.seed,
            **({"threads": self.threads} if self.threads else {}),
            **calibration,
            "passes": [
                {"use": s.use, "id": s.id, "inputs": dict(s.inputs), "with": dict(s.options)} for s in self.passes
            ],
            "targets": [target_json(t) for t in self.targets],
            "gates": dict(self.gates),
        }

    def _check(self, name: str) -> None:
        ids = [t.id for t in self.targets]
        twice = next((i for i in ids if ids.count(i) > 1), None)
        if twice:
            raise UsageError(f"{name}: target {twice} is asked for twice; each target is one directory")
        grid = next((s.use for s in self.passes if s.use in _MAKES_A_GRID), None)
        quantizing = next((t.id for t in self.targets if is_quantizing(t)), None)
        if grid and quantizing:
            raise UsageError(
                f"{name}: target {quantizing} would quantize what {grid} has quantized already",
                hint="ask for the container alone (it carries the passes' integers), or leave the pass out",
            )


def parse_target(word: str) -> Target:
    """`CONTAINER[:SCHEME]`.

    Raises:
        UsageError: no such container; the message suggests the nearest.
    """
    container, _, scheme = word.strip().lower().partition(":")
    if container not in CONTAINERS:
        raise UsageError(
            f"--to {word}: container {container!r} is unknown{did_you_mean(container, CONTAINERS)}",
            hint=f"CONTAINER[:SCHEME], containers: {', '.join(CONTAINERS)}",
        )
    if word.endswith(":"):
        raise UsageError(f"--to {word}: a scheme must follow the colon, or leave the colon out")
    return Target(container, _scheme(scheme))


def is_quantizing(target: Target) -> bool:
    """Whether the scheme puts weights on a grid; plain element types do not."""
    return target.scheme is not None and target.scheme.removesuffix("-portable") not in _PLAIN_SCHEMES


def target_json(target: Target) -> dict[str, Any]:
    """A target as a recipe writes it."""
    return {
        "to": target.container,
        **({"scheme": target.scheme} if target.scheme else {}),
        **({"with": dict(target.options)} if target.options else {}),
    }


def _scheme(word: str | None) -> str | None:
    if not word:
        return None
    if not all(c.isalnum() or c in "_-" for c in word):
        raise UsageError(f"scheme {word!r} holds more than letters, digits, - and _")
    return word.lower()


def _absolute(text: str) -> str:
    """A path given as a flag starts at the working directory, whatever the recipe's is."""
    return str(Path(text).resolve()) if text != SELF and Path(text).exists() else text


def _numbered(use: str, number: int) -> str:
    return use if number == 1 else f"{use}-{number}"


def _steps(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[Step, ...]:
    steps: list[Step] = []
    taken = {"source"}
    named = {entry["id"] for entry in entries if "id" in entry}
    for entry in entries:
        count = 1
        while "id" not in entry and _numbered(entry["use"], count) in taken | named:
            count += 1
        step_id = entry.get("id") or _numbered(entry["use"], count)
        if step_id in taken:
            raise UsageError(f"{name}: the id {step_id!r} is taken twice")
        taken.add(step_id)
        steps.append(Step(entry["use"], step_id, dict(entry.get("inputs", {})), dict(entry.get("with", {}))))
    return tuple(steps)


@functools.cache
def schema() -> dict[str, Any]:
    """The published JSON Schema."""
    text = (resources.files("tightship") / "recipe.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _check_schema(data: Any, name: str) -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    for error in sorted(validator.iter_errors(data), key=lambda e: list(map(str, e.absolute_path))):
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
        place = f"{name}: {where}" if where else name
        if error.validator == "additionalProperties":
            known = list(error.schema["properties"])
            word = next(key for key in error.instance if key not in known)
            raise UsageError(
                f"{place}: the key {word!r} is unknown{did_you_mean(str(word), known)}",
                hint=f"keys: {', '.join(known)}",
            )
        if error.validator == "type" and not where:
            raise UsageError(f"{name}: a recipe is a mapping, found {type(error.instance).__name__}")
        raise UsageError(f"{place}: {error.message:.200}")
