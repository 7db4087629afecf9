"""Low rank as a safetensors artifact stores it, read back as the weights that it was written from.

| weight                 | tensors                                | in                    | said by                   |
|------------------------|----------------------------------------|-----------------------|---------------------------|
| X.weight: Factored     | X.right.weight (r, in), X.left.weight  | factored.safetensors  | `low_rank` in config.json |
| X.weight: Sum with B A | A = ...X.lora_A.weight (r, in), lora_B | adapter/, PEFT's form | adapter_config.json       |

Either factor of a module may be quantized. An adapter is read where it computes X(x) + B A x: LoRA, alpha equal to the
rank of every module, nothing else trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tightship.errors import Malformed, Unsupported
from tightship.sidecars import MAX_CONFIG, Folder
from tightship.untrusted import strict_json
from tightship.weights import Dense, Factored, Quantized, Sum

FACTORED = "factored.safetensors"
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_PREFIX = "base_model.model."
_EXTRAS = ("use_dora", "use_rslora", "modules_to_save", "lora_bias", "fan_in_fan_out")

Matrix = Dense | Quantized
Known = TypeVar("Known", bound="Matrix | Factored")


def adapter_files(folder: Folder) -> tuple[str, ...]:
    """The files of the adapter beside the model, or none."""
    return ADAPTER_FILES if (folder.root / ADAPTER_FILES[0]).exists() else ()


def take_ranks(config: dict[str, Any], folder: Folder) -> dict[str, int]:
    """Module -> rank, taken out of the config of a directory that holds factored modules; empty for any other.

    Raises:
        Malformed: config.json does not say the ranks.
    """
    if not {FACTORED, f"{FACTORED}.index.json"} & folder.names:
        return {}
    found = config.pop("low_rank", None)
    if not isinstance(found, dict) or not all(type(rank) is int and rank > 0 for rank in found.values()):
        raise Malformed(f"{FACTORED} is here, and `low_rank` of config.json is no map from modules to their ranks")
    return found


def joined(tensors: Mapping[str, Matrix], ranks: Mapping[str, int]) -> dict[str, Matrix | Factored]:
    """`tensors` with X.weight in the place of the factors of each module X of `ranks`.

    Raises:
        Malformed: a factor is missing, or the two do not meet at the rank.
    """
    found: dict[str, Matrix | Factored] = dict(tensors)
    for name, rank in ranks.items():
        sides = [found.pop(f"{name}.{side}.weight", None) for side in ("left", "right")]
        found[f"{name}.weight"] = _product(f"{name}.weight", sides, rank)
    return found


def corrected(weights: Mapping[str, Known], folder: Folder) -> dict[str, Known | Sum]:
    """`weights` with the corrections of the directory's PEFT adapter, if there is one.

    Raises:
        Malformed: the adapter is for other matrices.
        Unsupported: it computes something else than X(x) + B A x.
    """
    from tightship.formats.safetensors_file import read_header

    found: dict[str, Known | Sum] = dict(weights)
    if not adapter_files(folder):
        return found
    config = strict_json(folder.read(ADAPTER_FILES[0], MAX_CONFIG), ADAPTER_FILES[0])
    header = read_header(folder.resolve(ADAPTER_FILES[1]))
    factors = {name: header.dense(name) for name in header.entries}
    for module, rank in _adapted(config).items():
        name = f"{module}.weight"
        sides = [factors.pop(f"{_PREFIX}{module}.lora_{side}.weight", None) for side in "BA"]
        base = weights.get(name)
        if not isinstance(base, Dense | Quantized):
            raise Malformed("the adapter corrects a matrix that the model does not have", tensor=name)
        found[name] = Sum(base, _product(name, sides, rank))
    if factors:
        raise Malformed(f"{ADAPTER_FILES[0]} does not name the module of this factor", tensor=next(iter(factors)))
    return found


def _product(name: str, sides: list[Any], rank: int) -> Factored:
    left, right = sides
    if left is None or right is None:
        raise Malformed("one of its two factors is missing", tensor=name)
    if len(left.shape) != 2 or len(right.shape) != 2 or not left.shape[1] == right.shape[0] == rank:
        raise Malformed(f"factors of shapes {left.shape} and {right.shape} where rank {rank} is said", tensor=name)
    return Factored(left, right)


def _adapted(config: Any) -> dict[str, int]:
    """Module -> rank, of an adapter that adds B A x and does nothing else."""
    try:
        names, ranks, alphas = config["target_modules"], config["rank_pattern"], config["alpha_pattern"]
        found = {str(name): int(ranks.get(name, config["r"])) for name in names}
        scales = {name: alphas.get(name, config["lora_alpha"]) / rank for name, rank in found.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise Malformed(f"{ADAPTER_FILES[0]} does not say modules, ranks and alpha") from error
    extra = next((key for key in _EXTRAS if config.get(key)), None)
    if extra or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        what = f"{extra} is set" if extra else f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise Unsupported(f"{ADAPTER_FILES[0]}: {what}", hint="merge the adapter into the model with PEFT")
    scaled = next((name for name, scale in scales.items() if scale != 1), None)
    if scaled is not None:
        raise Unsupported(
            f"{ADAPTER_FILES[0]} scales the correction by {scales[scaled]:g}; only 1 is read",
            tensor=f"{scaled}.weight",
            hint="merge the adapter into the model with PEFT",
        )
    return found
