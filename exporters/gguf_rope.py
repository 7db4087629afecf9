"""Rotary position embeddings in llama.cpp's terms.

| rope_type of config.json | rope.scaling.type | factors                                       |
|--------------------------|-------------------|-----------------------------------------------|
| default                  | none              |                                               |
| linear                   | linear            |                                               |
| dynamic                  | none              | (stretches beyond the context, where files end)|
| dynamic with `alpha`     | none              | (HunYuan: the base is stretched by it, for all)|
| llama3                   | none              | rope_freqs.weight, one divisor a frequency    |
| yarn                     | yarn              |                                               |
| longrope                 | longrope          | rope_factors_long.weight, _short.weight       |

What the loader computes by itself or ignores (YaRN's betas, attention factor and truncation) must have the value that
it assumes, else the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tightship.errors import Malformed, Unsupported
from tightship.formats.gguf_file import Field

_STRETCHED = "ntk_alpha"  # as HunYuan's class of transformers calls it


@dataclass(frozen=True)
class Rope:
    """Metadata under the architecture's prefix (keys without it), and tensors of factors."""

    fields: dict[str, Field]
    factors: dict[str, np.ndarray] = field(default_factory=dict)


def rope(config: Mapping[str, Any], hyper: Mapping[str, Any], gguf: Mapping[str, Any]) -> Rope:
    """Rotary settings of a config.json.

    Raises:
        Unsupported: a type or a parameter that the architecture's loader does not read.
        Malformed: a parameter is missing.
    """
    given = _parameters(config)
    local = _local(given, gguf)
    given = given.get("full_attention", given)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "dynamic" and given.get("alpha") and _STRETCHED in gguf["rope_types"]:
        kind = _STRETCHED
    elif kind == "dynamic":
        kind = "default"  # transformers changes the base for texts beyond max_position_embeddings alone
    if kind not in gguf["rope_types"]:
        raise Unsupported(
            f"llama.cpp's {gguf['arch']} does not read rope type {kind!r}; it reads {', '.join(gguf['rope_types'])}"
        )
    width = int(hyper.get("rope_dim", hyper.get("rotary", _partial(config, given)) * int(hyper["head_dim"])))
    base = float(given.get("rope_theta", config.get("rope_theta", hyper.get("rope_theta", 10000.0))))
    if kind == _STRETCHED:
        base *= float(given["alpha"]) ** (width / (width - 2))
    fields = {"rope.dimension_count": Field("u32", width), "rope.freq_base": Field("f32", base), **local}
    if kind == "linear":
        scaling = {"type": Field("str", "linear"), "factor": Field("f32", _need(given, "factor"))}
        return Rope(fields | _scaling(scaling))
    if kind == "llama3":
        factors = {"rope_freqs.weight": llama3_factors(given, base, width)}
        return Rope(fields | _scaling({"type": Field("str", "none")}), factors)
    if kind == "yarn":
        return Rope(fields | _scaling(_yarn(given, hyper, gguf)))
    if kind == "longrope":
        scaling, factors = _longrope(given, config, hyper, width)
        return Rope(fields | _scaling(scaling), factors)
    return Rope(fields | _scaling({"type": Field("str", "none")}))


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The new and the old spelling as one; the new one wins, as in transformers."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise Malformed(f"config.json: rope_parameters must be an object, found {given!r}")
    return {key: value for key, value in given.items() if value is not None}


def _local(given: Mapping[str, Any], gguf: Mapping[str, Any]) -> dict[str, Field]:
    """Where layers differ: the base of the sliding ones, which the loader never scales.

    Raises:
        Unsupported: other kinds of layers, a loader without them, or sliding layers that are scaled.
    """
    nested = {key: value for key, value in given.items() if isinstance(value, Mapping)}
    if not nested:
        return {}
    sliding = dict(nested.get("sliding_attention", {}))
    base = sliding.pop("rope_theta", None)
    if set(nested) != {"full_attention", "sliding_attention"} or gguf["window"] != "read" or base is None:
        raise Unsupported(f"rope parameters that differ by layer type ({', '.join(nested)}) are not mapped to GGUF")
    if sliding.get("rope_type", "default") != "default":
        raise Unsupported(f"llama.cpp's {gguf['arch']} does not scale sliding layers, config.json says {sliding}")
    return {"rope.freq_base_swa": Field("f32", float(base))}


def _partial(config: Mapping[str, Any], given: Mapping[str, Any]) -> float:
    return float(given.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))


def _need(given: Mapping[str, Any], key: str) -> float:
    if key not in given:
        raise Malformed(f"config.json: the rope parameters lack {key!r}")
    return float(given[key])


def _scaling(fields: Mapping[str, Field]) -> dict[str, Field]:
    return {f"rope.scaling.{key}": value for key, value in fields.items()}


def llama3_factors(given: Mapping[str, Any], base: float, width: int) -> np.ndarray:
    """(width / 2,) float32: what each frequency is divided by (Llama 3.1's smooth interpolation)."""
    factor, low, high, original = (
        _need(given, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisor = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    return divisor.astype(np.float32)


def _yarn(given: Mapping[str, Any], hyper: Mapping[str, Any], gguf: Mapping[str, Any]) -> dict[str, Field]:
    factor = _need(given, "factor")
    assumed = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
    more = {}
    if gguf.get("yarn_mscale") and given.get("mscale_all_dim"):
        # The loader takes a tenth of mscale_all_dim, and assumes that rotation itself is not scaled.
        more["yarn_log_multiplier"] = Field("f32", 0.1 * float(given["mscale_all_dim"]))
        assumed |= {"mscale": given["mscale_all_dim"], "mscale_all_dim": given["mscale_all_dim"]}
    for key, value in assumed.items():
        if key in given and given[key] != value:
            raise Unsupported(f"llama.cpp computes YaRN with {key} = {value}, config.json says {given[key]!r}")
    usual = 0.1 * math.log(factor) + 1
    if not math.isclose(float(given.get("attention_factor", usual)), usual, rel_tol=1e-6):
        raise Unsupported(
            f"llama.cpp computes YaRN's attention factor as {usual:.6g}, config.json says {given['attention_factor']}"
        )
    original = int(given.get("original_max_position_embeddings", hyper["context"]))
    return {
        "type": Field("str", "yarn"),
        "factor": Field("f32", factor),
        "original_context_length": Field("u32", original),
        **more,
    }


def _longrope(
    given: Mapping[str, Any], config: Mapping[str, Any], hyper: Mapping[str, Any], width: int
) -> tuple[dict[str, Field], dict[str, np.ndarray]]:
    original = int(given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or 0)
    if not original:
        raise Malformed("config.json: longrope lacks original_max_position_embeddings")
    scale = max(1.0, int(hyper["context"]) / original)
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    fields = {
        "type": Field("str", "longrope"),
        "original_context_length": Field("u32", original),
        "attn_factor": Field("f32", float(given.get("attention_factor", usual))),
    }
    factors = {}
    for kind in ("long", "short"):
        values = np.asarray(given.get(f"{kind}_factor", ()), np.float32)
        if values.shape != (width // 2,):
            raise Malformed(f"config.json: {kind}_factor must have {width // 2} numbers, found {values.size}")
        factors[f"rope_factors_{kind}.weight"] = values
    return fields, factors
