"""Model families as data: one JSON file a family in `architectures/`, checked against `architectures/schema.json`.

A file says which tensors a checkpoint of the family holds (on-disk name, role, kind, shape), how they are called in
GGUF, which config key means what, and what is tied. Unknown keys are refused; nothing required has a default.

Names hold `{i}` for the block number and `{e}` for the expert number. Shapes are lists of expressions over the
hyper-parameters of `config` (`heads*head_dim`), so every size is known without data.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tightship.errors import Malformed, Unsupported

KINDS = ("linear", "embedding", "head", "norm", "bias", "router", "position", "other")
_FACTOR = re.compile(r"([*/]?)\s*([a-z_0-9]+)")


@dataclass(frozen=True)
class TensorRule:
    """One line of the table: a tensor, or one per block (and expert).

    Attributes:
        disk: on-disk name with `{i}`, `{e}`.
        role: what it does, in GGUF's words (`attn_q`, `ffn_down`, `token_embd`, ...); equal across families.
        kind: one of KINDS. `linear` means a matrix multiplied with activations inside a block.
        shape: expressions over hyper-parameters, (out, in) for matrices.
        gguf: the GGUF name with `{i}`, or None where GGUF has no place for it (dropped there on purpose).
        optional: may be absent.
        transposed: stored (in, out) on disk (GPT-2's Conv1D); turned on opening and turned back on writing.
        transform: what GGUF wants done, a word the GGUF exporter knows (`rope_permute_q`, `plus_one`, ...).
    """

    disk: str
    role: str
    kind: str
    shape: tuple[str, ...]
    gguf: str | None
    optional: bool = False
    transposed: bool = False
    transform: str | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A rule made concrete for one name: block number, expert number, shape as integers."""

    name: str
    rule: TensorRule
    block: int | None
    expert: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """One family. See the module docstring and `architectures/schema.json` for the meaning of the fields."""

    family: str
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    task: str
    config: Mapping[str, Any]
    tensors: tuple[TensorRule, ...]
    ties: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    block_prefix: str
    gguf: Mapping[str, Any] | None
    gguf_refusal: str | None
    refuses: tuple[Mapping[str, Any], ...]
    folds: tuple[Mapping[str, Any], ...]

    def hyper(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Canonical hyper-parameters of a concrete config.json.

        Each entry of `config` is a key name, or a list of alternatives tried in order; an alternative starting with
        `=` is an expression over what was already found.

        Raises:
            Malformed: none of the alternatives is there.
        """
        found: dict[str, Any] = {}
        for name, alternatives in self.config.items():
            options = [alternatives] if isinstance(alternatives, str) else list(alternatives)
            for option in options:
                if option.startswith("="):
                    found[name] = literal(option[1:], found)
                    break
                value = _dig(config, option)
                if value is not None:
                    found[name] = value
                    break
            else:
                raise Malformed(
                    f"config.json of a {self.family} model needs {' or '.join(options)}, found neither",
                    hint="restore the original config.json",
                )
        return found

    def expected(self, config: Mapping[str, Any]) -> Iterator[TensorInfo]:
        """Every tensor a checkpoint with this config may hold, in table order, blocks ascending."""
        hyper = self.hyper(config)
        for rule in self.tensors:
            shape = tuple(int(literal(term, hyper)) for term in rule.shape)
            blocks = range(int(hyper["layers"])) if "{i}" in rule.disk else [None]
            experts = range(int(hyper.get("experts", 0))) if "{e}" in rule.disk else [None]
            for block in blocks:
                for expert in experts:
                    name = rule.disk.format(i=block, e=expert)
                    yield TensorInfo(name, rule, block, expert, shape)

    def lookup(self, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
        """`expected` by on-disk name."""
        return {info.name: info for info in self.expected(config)}

    def check_supported(self, config: Mapping[str, Any]) -> None:
        """Refuse config features that nobody maps.

        Raises:
            Unsupported: naming the key, its value and why.
        """
        for rule in self.refuses:
            value = _dig(config, rule["key"])
            if value is not None and value not in rule["allowed"]:
                raise Unsupported(f"{self.family}: config {rule['key']} = {value!r} is not supported: {rule['why']}")


def literal(expression: str, hyper: Mapping[str, Any]) -> Any:
    """Value of a name, or of a sum of products (`heads*head_dim`, `hidden/heads+2`): the data files' whole arithmetic.

    Raises:
        Malformed: a name that is not a hyper-parameter.
    """
    if expression in hyper:
        return hyper[expression]
    return sum(_product(term, expression, hyper) for term in expression.split("+"))


def _product(term: str, expression: str, hyper: Mapping[str, Any]) -> int:
    value = 1
    for operator, name in _FACTOR.findall(term):
        if not name.isdigit() and name not in hyper:
            raise Malformed(f"architecture expression {expression!r} needs {name!r}, which the config does not give")
        factor = int(name) if name.isdigit() else hyper[name]
        value = value // factor if operator == "/" else value * factor
    return value


def _dig(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


@functools.cache
def all_architectures() -> dict[str, Architecture]:
    """Every family, by family name.

    Raises:
        Malformed: a data file does not fit the schema, or two files claim one model type and class.
    """
    import jsonschema

    folder = resources.files("tightship.architectures")
    schema = json.loads((folder / "schema.json").read_text())
    families: dict[str, Architecture] = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if not entry.name.endswith(".json") or entry.name == "schema.json":
            continue
        data = json.loads(entry.read_text())
        try:
            jsonschema.validate(data, schema)
        except jsonschema.ValidationError as error:
            raise Malformed(f"architectures/{entry.name}: {error.message}") from error
        families[data["family"]] = _build(data)
    return families


def _build(data: Mapping[str, Any]) -> Architecture:
    return Architecture(
        family=data["family"],
        model_types=tuple(data["model_types"]),
        classes=tuple(data["classes"]),
        task=data["task"],
        config=data["config"],
        tensors=tuple(TensorRule(**{**rule, "shape": tuple(rule["shape"])}) for rule in data["tensors"]),
        ties=tuple((a, b) for a, b in data["ties"]),
        ignored=tuple(data["ignored"]),
        block_prefix=data["block_prefix"],
        gguf=data["gguf"],
        gguf_refusal=data.get("gguf_refusal"),
        refuses=tuple(data["refuses"]),
        folds=tuple(data.get("folds", ())),
    )


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json: by class name first, then by model type.

    Raises:
        Unsupported: no data file claims it; the message lists the known model types.
    """
    families = all_architectures().values()
    classes = config.get("architectures") or []
    model_type = config.get("model_type")
    for family in families:
        if model_type in family.model_types and any(c in family.classes for c in classes):
            return family
    for family in families:
        if not classes and model_type in family.model_types:
            return family
    known = sorted({t for f in families for t in f.model_types})
    raise Unsupported(
        f"architecture {classes or '(none named)'} with model_type {model_type!r} is not one we know",
        hint=f"known model types: {', '.join(known)}; docs/adding-an-architecture.md shows how to add a data file",
    )
