"""Model families as data: one JSON file a family in `architectures/`, checked against `architectures/schema.json`.

A file says which tensors a checkpoint of the family holds (on-disk name, role, kind, shape), how they are called in
GGUF, which config key means what, and what is tied. Unknown keys are refused; nothing required has a default.

Names hold `{i}` for the block number and `{e}` for the expert number. Shapes are lists of expressions over the
hyper-parameters of `config` (`heads*head_dim`), so every size is known without data.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from tightship.errors import Malformed, Unsupported
from tightship.expressions import alternative, dig, holds, literal
from tightship.per_layer import WIDTHS, check_layers, has_unlike_layers, layer_config
from tightship.untrusted import strict_json

KINDS = ("linear", "embedding", "head", "norm", "bias", "router", "position", "other")


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
        when: config keys and the values under which the tensor exists; a key that is not in the config has value None.
        unless: the same, for values under which it does not.
        layers: a hyper-parameter that is 1 for blocks that have it: a list, or one number for all; `!` turns it round.
        blocks: the first block that has it and the first after it, as expressions; every block where left out.
    """

    disk: str
    role: str
    kind: str
    shape: tuple[str, ...]
    gguf: str | None
    optional: bool = False
    transposed: bool = False
    transform: str | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    layers: str | None = None
    blocks: tuple[str, str] = ("0", "layers")


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
    """One family, or one variant of it. `architectures/schema.json` says what the fields mean."""

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
    stream: Mapping[str, Any] | None = None
    base_prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    packed_note: str | None = None
    sdpa_when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prunable: Mapping[str, Any] = field(default_factory=dict)
    decoder_prefix: str | None = None

    @property
    def recurrent(self) -> bool:
        """Whether blocks, or some of them, keep a state of fixed size where others keep keys and values."""
        return any(rule.role in {"ssm_conv1d", "shortconv_conv"} for rule in self.tensors)

    def hyper(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Canonical hyper-parameters of a concrete config.json.

        Each entry of `config` is an alternative of `tightship.expressions`, or a list of them tried in order.

        Raises:
            Malformed: none of the alternatives is there.
        """
        found: dict[str, Any] = {}
        for name, alternatives in self.config.items():
            options = alternatives if isinstance(alternatives, list) else [alternatives]
            for option in options:
                value = alternative(option, config, found)
                if value is not None or option == "none":
                    found[name] = value
                    break
            else:
                raise Malformed(
                    f"config.json of a {self.family} model needs {' or '.join(map(str, options))}, found neither",
                    hint="restore the original config.json",
                )
        return found

    def keys(self, width: str) -> list[str]:
        """Top-level keys of config.json that say a width, in the order in which they are looked at."""
        options = self.config.get(width, ())
        words = [options] if isinstance(options, str) else options
        return [w for w in words if isinstance(w, str) and re.fullmatch(r"[A-Za-z_0-9]+", w) and w != "none"]

    def expected(self, config: Mapping[str, Any]) -> Iterator[TensorInfo]:
        """Every tensor a checkpoint with this config may hold, in table order, blocks ascending."""
        hyper = self.hyper(config)
        own = {}
        if has_unlike_layers(config):
            own = {block: self.hyper(layer_config(config, block)) for block in range(int(hyper["layers"]))}
        for rule in self.tensors:
            if not holds(rule.when, config) or (rule.unless and holds(rule.unless, config)):
                continue
            whole = shape_of(rule, hyper)
            blocks = _blocks(rule, hyper) if "{i}" in rule.disk else [None]
            experts = range(int(hyper.get("experts", 0))) if "{e}" in rule.disk else [None]
            for block in blocks:
                shape = shape_of(rule, own[block]) if block in own else whole
                for expert in experts:
                    name = rule.disk.format(i=block, e=expert)
                    yield TensorInfo(name, rule, block, expert, shape)

    def lookup(self, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
        """`expected` by on-disk name."""
        return {info.name: info for info in self.expected(config)}

    def ignores(self, name: str) -> bool:
        """Whether an on-disk name is a buffer that is dropped on purpose."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)

    def attention(self, config: Mapping[str, Any]) -> str:
        """transformers' implementation of attention that computes the model: the plain one, unless it is wrong."""
        return "sdpa" if self.sdpa_when and holds(self.sdpa_when, config) else "eager"

    def check_supported(self, config: Mapping[str, Any]) -> None:
        """Refuse config features that nobody maps.

        Raises:
            Unsupported: naming the key, its value and why.
            Malformed: widths of single layers that are none.
        """
        if has_unlike_layers(config):
            check_layers(config, int(self.hyper(config)["layers"]), [key for w in WIDTHS for key in self.keys(w)])
        self._refuse(self.refuses, config, "")

    def check_gguf(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The `gguf` section, after a look at the config features that llama.cpp would compute differently.

        Raises:
            Unsupported: the family has no GGUF mapping, or the config asks for something its graph does not do.
        """
        if self.gguf is None:
            raise Unsupported(
                f"{self.family} has no GGUF form: {self.gguf_refusal}", hint="export to onnx or safetensors"
            )
        self._refuse(self.gguf.get("requires", ()), config, " in GGUF")
        return self.gguf

    def _refuse(self, rules: Iterable[Mapping[str, Any]], config: Mapping[str, Any], where: str) -> None:
        for rule in rules:
            value = dig(config, rule["key"])
            if value is None or not holds(rule.get("when", {}), config):
                continue
            if not self._agrees(value, rule, config):
                raise Unsupported(f"{self.family}: {rule['key']} = {value!r} is not supported{where}: {rule['why']}")

    def _agrees(self, value: Any, rule: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        if "full_every" in rule:  # layer_types: every n-th layer sees everything, the others a window
            period, place = full_layers(rule)
            return all((entry == "full_attention") == (i % period == place) for i, entry in enumerate(value))
        if "zero_every" in rule:  # no_rope_layers: every n-th layer is 0, the others 1
            return bool(value == [int(i % int(rule["zero_every"]) != 0) for i in range(1, len(value) + 1)])
        if "most" in rule:
            return bool(value <= literal(rule["most"], self.hyper(config)))
        if "equals" in rule:
            return bool(value == literal(rule["equals"], self.hyper(config)))
        return value not in rule.get("refused", ()) and ("allowed" not in rule or value in rule["allowed"])


def _blocks(rule: TensorRule, hyper: Mapping[str, Any]) -> Sequence[int]:
    """The blocks that have the rule's tensor.

    Raises:
        Malformed: the config tells layers apart, and does not speak of all.
    """
    blocks = range(*(int(literal(end, hyper)) for end in rule.blocks))
    if rule.layers is None:
        return blocks
    marks, wanted = hyper[rule.layers.removeprefix("!")], not rule.layers.startswith("!")
    if not isinstance(marks, list):
        return blocks if bool(marks) == wanted else ()
    if len(marks) < blocks.stop:
        raise Malformed(f"config.json tells the kind of {len(marks)} layers, and the model has {blocks.stop}")
    return [i for i in blocks if bool(marks[i]) == wanted]


def shape_of(rule: TensorRule, hyper: Mapping[str, Any]) -> tuple[int, ...]:
    """The rule's shape for these hyper-parameters."""
    return tuple(int(literal(term, hyper)) for term in rule.shape)


def full_layers(rule: Mapping[str, Any]) -> tuple[int, int]:
    """Period, and place in it, of the layers that see everything, of a `full_every` rule."""
    period = int(rule["full_every"])
    return period, 0 if rule.get("full_first") else period - 1


@functools.cache
def all_architectures() -> tuple[Architecture, ...]:
    """Every family and variant, families in the order of their files, variants in the order of the file.

    Raises:
        Malformed: a data file does not fit the schema, or two claim one model type and class.
    """
    found = tuple(a for name in _files() for a in _checked(name))
    claims = [(t, c) for a in found for t in a.model_types for c in a.classes]
    twice = sorted({claim for claim in claims if claims.count(claim) > 1})
    if twice:
        raise Malformed(f"two architecture files claim model type and class {twice[0]}")
    return found


@functools.cache
def _files() -> dict[str, Any]:
    """What the data files hold, by name, in order."""
    folder = resources.files("tightship.architectures")
    names = sorted(e.name for e in folder.iterdir() if e.name.endswith(".json") and e.name != "schema.json")
    return {name: strict_json((folder / name).read_bytes(), f"architectures/{name}") for name in names}


@functools.cache
def _checked(name: str) -> list[Architecture]:
    """The architectures of a file that fits the schema; checking takes long, so only what is asked for is checked."""
    import jsonschema

    schema = json.loads((resources.files("tightship.architectures") / "schema.json").read_text())
    # `jsonschema.validate` would check the schema itself again for each file.
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(_files()[name]))
    if error is not None:
        raise Malformed(f"architectures/{name}: {error.message}")
    return build(_files()[name])


def build(data: Mapping[str, Any]) -> list[Architecture]:
    """The architectures of one data file: one, or one per variant."""
    prefix = data.get("base_prefix", "")
    whole = Architecture(
        family=data["family"],
        model_types=tuple(data["model_types"]),
        classes=tuple(data["classes"]),
        task=data["task"],
        config=data["config"],
        tensors=tuple(map(_rule, data["tensors"])),
        ties=tuple((a, b) for a, b in data["ties"]),
        ignored=tuple(data["ignored"]),
        block_prefix=data["block_prefix"],
        decoder_prefix=data.get("decoder_prefix"),
        gguf=data["gguf"],
        gguf_refusal=data.get("gguf_refusal"),
        refuses=tuple(data["refuses"]),
        folds=tuple(data.get("folds", ())),
        stream=data.get("stream"),
        base_prefix=prefix,
        renames=tuple((a, b) for a, b in data.get("renames", ())),
        packed_note=data.get("packed_note"),
        sdpa_when={key: tuple(values) for key, values in data.get("sdpa_when", {}).items()},
        prunable=data.get("prunable", {}),
    )
    return [whole, *(_variant(whole, variant) for variant in data.get("variants", ()))]


def _rule(data: Mapping[str, Any]) -> TensorRule:
    conditions = {
        word: {key: tuple(values) for key, values in data.get(word, {}).items()} for word in ("when", "unless")
    }
    blocks = tuple(data.get("blocks", ("0", "layers")))
    return TensorRule(**{**data, "shape": tuple(data["shape"]), "blocks": blocks, **conditions})


def _variant(whole: Architecture, data: Mapping[str, Any]) -> Architecture:
    """The body of `whole` (the tensors under its base prefix) with other heads; a bare body loses the prefix."""
    prefix = whole.base_prefix
    body = [rule for rule in whole.tensors if rule.disk.startswith(prefix)]
    block_prefix = whole.block_prefix
    if data.get("bare"):
        body = [replace(rule, disk=rule.disk.removeprefix(prefix)) for rule in body]
        block_prefix = block_prefix.removeprefix(prefix)
    refusal = data.get("gguf_refusal", whole.gguf_refusal)
    return replace(
        whole,
        classes=tuple(data["classes"]),
        task=data["task"],
        tensors=(*body, *map(_rule, data["tensors"])),
        ties=tuple((a, b) for a, b in data["ties"]),
        ignored=tuple(data["ignored"]),
        block_prefix=block_prefix,
        gguf=None if "gguf_refusal" in data else whole.gguf,
        gguf_refusal=refusal,
    )


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json: by class name first, then by model type.

    Raises:
        Unsupported: no data file claims it; the message lists the known model types.
    """
    classes = config.get("architectures") or []
    model_type = config.get("model_type")
    claims = {name: data.get("model_types", ()) for name, data in _files().items()}
    families = [a for name, types in claims.items() if model_type in types for a in _checked(name)]
    for family in families:
        if model_type in family.model_types and any(c in family.classes for c in classes):
            return family
    for family in families:
        if not classes and model_type in family.model_types:
            return family
    known = sorted({t for types in claims.values() for t in types})
    raise Unsupported(
        f"architecture {classes or '(none named)'} with model_type {model_type!r} is not one we know",
        hint=f"known model types: {', '.join(known)}; docs/adding-an-architecture.md shows how to add a data file",
    )
