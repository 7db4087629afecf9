"""What each family does that Llama does not, as data. Adding a family whose parts are all here: one line.

Whatever a config asks for beyond it (a window, soft caps, partial or scaled rotation, biases, tied tables) is read
from transformers' resolved config and from the stored tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Routing:
    """How tokens find their experts.

    Attributes:
        late: softmax over the chosen scores; else over all of them, before the choice.
        sigmoid: scores are sigmoids, not softmax over all experts.
        renormalized: whether chosen probabilities are scaled to sum 1; a config key, or the answer.
        scale: config key of a factor on what chosen experts count.
        grouped: whether only experts of the best groups can be chosen; the answer, or (config key, value) for yes.
        best_of_group: a group's score is the sum of so many of its best.
        mixed: experts are chosen one by one, each with its softmax over those that come near it; the config key of half
            the distance, relative to the score (PhiMoE).
    """

    late: bool = False
    sigmoid: bool = False
    renormalized: str | bool = True
    scale: str | None = None
    grouped: bool | tuple[str, str] = False
    best_of_group: int = 1
    mixed: str | None = None


@dataclass(frozen=True)
class Family:
    """What a family does that Llama does not.

    Attributes:
        encoder: bidirectional.
        norm: `plus_one` multiplies by 1 + weight (Gemma); `layer` subtracts the mean although there is no bias
            (Cohere), `layer_plus_one` both (Nemotron).
        bare_norms: norms have no parameter at all (OLMo).
        norm_eps: of all norms, where the data file has no key for it.
        activation: where the data file has no key for it.
        embed_scale: embeddings times `sqrt` of the width (unless `scale_embedding` is false), or times a config key.
        position_offset: rows of the position table before position 0 (OPT).
        sinusoidal: positions are sines and cosines, computed: `inclusive` (XGLM) or `published` (Marian) frequencies.
        rotary_width: config key of the rotated width, where the base is 10000 and nothing scales it (GPT-J).
        parallel: attention and MLP read the same stream and are added together; a config key, or the answer.
        post_norm: config key that puts norms behind the residual sums where it is false (OPT).
        interleaved: rotation pairs neighbours (GPT-J), not halves.
        late_head_norm: norms of queries and keys stand behind the rotation (HunYuan).
        sized_rotation: a scaled rotation is made longer by one of two numbers of the config, for prompts within the
            original context and beyond it; frequencies are those for within (PhiMoE).
        rotated: which layers rotate: `all`, `sliding` ones only, or a config key with one flag a layer.
        fused: order of queries, keys and values in one matrix: `parts`, `groups` of heads around each key head, or
            `quarters` of heads with values before keys (CodeGen).
        alibi: scores lose distance times a slope a head, no rotation, unless the config has an `alibi` that is false.
            Places are `counted` over unmasked tokens (BLOOM), in bfloat16 and `scaled` like scores (Falcon), or
            `indexed` (MPT).
        counted_positions: of an encoder, over tokens that are no padding (RoBERTa).
        attention_scale: config key of the factor on scores; `none` for 1. Else query_pre_attn_scalar or the head size
            to the power -1/2.
        scaled: whether scores have that factor; a config key, or the answer.
        by_layer: whether scores are divided by the number of the layer, from 1; a config key, or the answer.
        residual_scale: config key of the factor on what a block adds.
        narrowed: whether what logits are made of is divided by the root of the width; a config key, or the answer.
        logit_scale: (config key, whether it divides).
        routing: of experts.
        stacked: matrices of stacked experts are `out_in` or `in_out`; gate and up lie in one, in halves or, `in_out`,
            in turns with clamped values (gpt-oss).
        pooled: the activation behind the pooler of a classifier.
        must: config keys with the only values that are written down here, and why.
    """

    encoder: bool = False
    norm: str = "auto"
    bare_norms: bool = False
    norm_eps: float = 1e-5
    activation: str = "gelu"
    embed_scale: str | None = None
    position_offset: int = 0
    sinusoidal: str | None = None
    rotary_width: str | None = None
    parallel: str | bool = False
    post_norm: str | None = None
    interleaved: bool = False
    late_head_norm: bool = False
    sized_rotation: bool = False
    rotated: str = "all"
    fused: str = "parts"
    alibi: str | None = None
    counted_positions: bool = False
    attention_scale: str | None = None
    scaled: str | bool = True
    by_layer: str | bool = False
    residual_scale: str | None = None
    narrowed: str | bool = False
    logit_scale: tuple[str, bool] | None = None
    routing: Routing = Routing()
    stacked: str = "out_in"
    pooled: str = "Tanh"
    must: tuple[tuple[str, Any, str], ...] = ()


_ENCODER = Family(encoder=True, norm="layer")
_SCALED = (("scale_embedding", True, "embeddings are scaled here"),)
_COHERE = Family(norm="layer", parallel=True, interleaved=True, logit_scale=("logit_scale", False))
_GEMMA = Family(norm="plus_one", embed_scale="sqrt")
_GRANITE = Family(
    embed_scale="embedding_multiplier",
    attention_scale="attention_multiplier",
    residual_scale="residual_multiplier",
    logit_scale=("logits_scaling", True),
    routing=Routing(late=True),
)
_TWO_STACKS = Family(norm="layer", embed_scale="sqrt")
_ROUTED = Family(routing=Routing(renormalized="norm_topk_prob"))
_BIASED = Routing(
    sigmoid=True, renormalized="norm_topk_prob", scale="routed_scaling_factor", grouped=True, best_of_group=2
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "qwen2": Family(),
    "qwen2_moe": _ROUTED,
    "qwen3": Family(),
    "qwen3_moe": _ROUTED,
    "olmo2": Family(),
    "olmoe": _ROUTED,
    "phi": Family(parallel=True),
    "phi3": Family(),
    "phimoe": Family(sized_rotation=True, routing=Routing(mixed="router_jitter_noise")),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "starcoder2": Family(),
    "stablelm": Family(parallel="use_parallel_residual"),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, rotated="sliding"),
    "nemotron": Family(norm="layer_plus_one"),
    "exaone4": Family(rotated="sliding"),
    "helium": Family(interleaved=True),
    "glm": Family(interleaved=True),
    "gpt_oss": Family(routing=Routing(late=True), stacked="in_out"),
    "persimmon": Family(fused="groups"),
    "gptj": Family(parallel=True, interleaved=True, rotary_width="rotary_dim"),
    "codegen": Family(parallel=True, interleaved=True, rotary_width="rotary_dim", fused="quarters"),
    "gpt_neo": Family(attention_scale="none"),
    "gpt_bigcode": Family(scaled="scale_attn_weights", must=(("multi_query", True, "there is one key head here"),)),
    "xglm": Family(embed_scale="sqrt", position_offset=2, sinusoidal="inclusive", must=_SCALED),
    "biogpt": Family(embed_scale="sqrt", position_offset=2, must=_SCALED),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "seed_oss": Family(),
    "cwm": Family(),
    "ministral": Family(),
    "dots1": Family(routing=_BIASED),
    "solar_open": Family(routing=_BIASED),
    "flex_olmo": _ROUTED,
    "hunyuan_v1_dense": Family(late_head_norm=True),
    "hunyuan_v1_moe": Family(late_head_norm=True),
    "jais2": Family(norm="layer"),
    "glm4_moe_lite": Family(interleaved=True, routing=_BIASED),
    "gpt2": Family(scaled="scale_attn_weights", by_layer="scale_attn_by_inverse_layer_idx"),
    "gpt_neox": Family(parallel="use_parallel_residual", fused="groups"),
    "bloom": Family(
        alibi="counted",
        fused="groups",
        activation="gelu_new",
        must=(("apply_residual_connection_post_layernorm", False, "sums go around norms here"),),
    ),
    "opt": Family(position_offset=2, post_norm="do_layer_norm_before"),
    "falcon": Family(parallel="parallel_attn", fused="groups", alibi="scaled"),
    "mpt": Family(alibi="indexed", norm="layer", must=(("no_bias", True, "there are no biases here"),)),
    "olmo": Family(norm="layer", bare_norms=True),
    "smollm3": Family(rotated="no_rope_layers"),
    "glm4": Family(interleaved=True),
    "mamba": Family(),
    "falcon_mamba": Family(),
    "lfm2": Family(activation="silu"),
    "arcee": Family(),
    "ernie4_5": Family(interleaved=True),
    "olmo3": Family(),
    "deepseek_v2": Family(
        interleaved=True,
        routing=Routing(
            renormalized=False, scale="routed_scaling_factor", grouped=("topk_method", "group_limited_greedy")
        ),
    ),
    "deepseek_v3": Family(interleaved=True, routing=_BIASED),
    "glm4_moe": Family(routing=_BIASED),
    "minimax_m2": Family(routing=Routing(sigmoid=True)),
    "bert": _ENCODER,
    "distilbert": replace(_ENCODER, norm_eps=1e-12, pooled="Relu"),
    "roberta": replace(_ENCODER, counted_positions=True),
    "electra": replace(_ENCODER, pooled="Gelu"),
    "albert": _ENCODER,
    "mpnet": replace(_ENCODER, counted_positions=True),
    "longformer": replace(_ENCODER, counted_positions=True),
    "deberta_v2": replace(_ENCODER, pooled="Gelu"),
    "nomic_bert": _ENCODER,
    "modernbert": _ENCODER,
    "vit": _ENCODER,
    "t5": Family(attention_scale="none", narrowed="scale_decoder_outputs"),
    "umt5": Family(attention_scale="none", narrowed=True),
    "m2m_100": replace(_TWO_STACKS, sinusoidal="inclusive", position_offset=2, counted_positions=True),
    "blenderbot_small": _TWO_STACKS,
    "bart": replace(_TWO_STACKS, position_offset=2),
    "mbart": replace(_TWO_STACKS, position_offset=2),
    "marian": replace(_TWO_STACKS, sinusoidal="published"),
    "pegasus": _TWO_STACKS,
    "blenderbot": _TWO_STACKS,
}
