"""Every family's data file against what transformers itself saves: nothing unknown, nothing missing, shapes right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tightship.architecture import all_architectures, architecture_for, build
from tightship.errors import Malformed, Unsupported
from tightship.expressions import alternative, literal
from tightship.opening import open_checkpoint
from tightship.weights import Alias

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON = SIZES
ENCODER = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {**SIZES, "ffn_dim": 96, "max_position_embeddings": 64}
DISTIL = {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 64}
BERT_HEADS = ("ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")
BERT_HEADS += ("ForNextSentencePrediction",)
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BLOOM = {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}
MODERN = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
MODERN |= {f"{kind}_bias": True for kind in ("norm", "attention", "mlp", "classifier")}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 32}
LATENT |= {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
GLM_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
GLM_MOE |= {"pad_token_id": 0, "head_dim": 16}
PHI_MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
LFM_PLAIN = {"block_auto_adjust_ff_dim": False, "tie_word_embeddings": False}
HUNYUAN_MOE = {"head_dim": 16, "num_experts": 3, "moe_topk": [2, 2]}
ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
MAMBA = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
SMOL = {"pad_token_id": 0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
MPT = {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
FALCON_NEW = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}

# (config class, model class, options)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaConfig", "LlamaForCausalLM", DECODER),
    ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True, "head_dim": 32}),
    ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    ("MistralConfig", "MistralForCausalLM", DECODER),
    ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    ("Qwen2Config", "Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 32}),
    ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "attention_bias": True, "tie_word_embeddings": True}),
    ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "head_dim": 32}),
    ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "attention_bias": True, "tie_word_embeddings": False}),
    ("Gemma3TextConfig", "Gemma3ForCausalLM", {**DECODER, "head_dim": 32}),
    ("Gemma3TextConfig", "Gemma3ForCausalLM", {**DECODER, "attention_bias": True, "tie_word_embeddings": False}),
    ("Phi3Config", "Phi3ForCausalLM", {**DECODER, "pad_token_id": 0}),
    ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    ("GPT2Config", "GPT2LMHeadModel", GPT2),
    ("GPT2Config", "GPT2LMHeadModel", {**GPT2, "n_inner": 80, "tie_word_embeddings": False}),
    ("OPTConfig", "OPTForCausalLM", OPT),
    ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("OPTConfig", "OPTForCausalLM", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("FalconConfig", "FalconForCausalLM", FALCON),
    ("FalconConfig", "FalconForCausalLM", {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False}),
    (
        "FalconConfig",
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    (
        "FalconConfig",
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    ("GemmaConfig", "GemmaForCausalLM", {**DECODER, "head_dim": 32}),
    ("GemmaConfig", "GemmaForCausalLM", {**DECODER, "attention_bias": True, "tie_word_embeddings": False}),
    ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**DECODER, **EXPERTS, "head_dim": 32, "attention_bias": True}),
    ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 48}),
    ("OlmoeConfig", "OlmoeForCausalLM", {**DECODER, "num_experts": 3, "num_experts_per_tok": 2}),
    ("Olmo2Config", "Olmo2ForCausalLM", {**DECODER, "attention_bias": True}),
    ("GraniteConfig", "GraniteForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    ("Starcoder2Config", "Starcoder2ForCausalLM", {**DECODER, "tie_word_embeddings": False}),
    ("Starcoder2Config", "Starcoder2ForCausalLM", {**DECODER, "use_bias": False}),
    ("PhiConfig", "PhiForCausalLM", DECODER),
    ("StableLmConfig", "StableLmForCausalLM", {**DECODER, "use_qkv_bias": True}),
    ("StableLmConfig", "StableLmForCausalLM", {**DECODER, "use_parallel_residual": True}),
    ("CohereConfig", "CohereForCausalLM", {**DECODER, "attention_bias": True, "tie_word_embeddings": False}),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", ENCODER),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**ENCODER, "attention_bias": False}),
    ("BloomConfig", "BloomForCausalLM", BLOOM),
    ("BloomConfig", "BloomForCausalLM", {**BLOOM, "tie_word_embeddings": False}),
    ("OlmoConfig", "OlmoForCausalLM", {**DECODER, "attention_bias": True}),
    ("OlmoConfig", "OlmoForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    ("SmolLM3Config", "SmolLM3ForCausalLM", {**DECODER, "pad_token_id": 0}),
    ("SmolLM3Config", "SmolLM3ForCausalLM", {**DECODER, **SMOL}),
    ("Glm4Config", "Glm4ForCausalLM", {**DECODER, "pad_token_id": 0, "head_dim": 32}),
    ("Glm4Config", "Glm4ForCausalLM", {**DECODER, "pad_token_id": 0, "attention_bias": False}),
    ("MptConfig", "MptForCausalLM", MPT),
    ("MptConfig", "MptForCausalLM", {**MPT, "tie_word_embeddings": False}),
    ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**DECODER, **LATENT}),
    ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**DECODER, **LATENT, "q_lora_rank": None}),
    ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**DECODER, **LATENT}),
    ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**DECODER, **LATENT, "q_lora_rank": None}),
    ("FalconMambaConfig", "FalconMambaForCausalLM", {**MAMBA, "use_bias": True}),
    ("FalconMambaConfig", "FalconMambaForCausalLM", {**MAMBA, "tie_word_embeddings": False}),
    ("ArceeConfig", "ArceeForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    ("Ernie4_5Config", "Ernie4_5ForCausalLM", {**DECODER, "use_bias": True, "pad_token_id": 0}),
    ("Ernie4_5Config", "Ernie4_5ForCausalLM", {**DECODER, "tie_word_embeddings": False, "pad_token_id": 0}),
    ("Olmo3Config", "Olmo3ForCausalLM", {**DECODER, "attention_bias": True, "pad_token_id": 0}),
    ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**DECODER, **GLM_MOE, "use_qk_norm": True, "attention_bias": True}),
    ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**DECODER, **GLM_MOE}),
    ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    ("SeedOssConfig", "SeedOssForCausalLM", {**DECODER, "head_dim": 32, "attention_out_bias": True, "mlp_bias": True}),
    ("SeedOssConfig", "SeedOssForCausalLM", {**DECODER, "attention_bias": False, "tie_word_embeddings": True}),
    ("CwmConfig", "CwmForCausalLM", {**DECODER, "head_dim": 16, "eos_token_id": 1, "bos_token_id": 0}),
    ("MinistralConfig", "MinistralForCausalLM", {**DECODER, "head_dim": 32}),
    ("Dots1Config", "Dots1ForCausalLM", {**DECODER, **GLM_MOE, "n_shared_experts": 1, "attention_bias": True}),
    ("SolarOpenConfig", "SolarOpenForCausalLM", {**DECODER, **GLM_MOE, **ENDS, "attention_bias": True}),
    ("FlexOlmoConfig", "FlexOlmoForCausalLM", {**DECODER, "num_experts": 3, "num_experts_per_tok": 2, **ENDS}),
    ("GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", {**DECODER, "shared_intermediate_size": 48}),
    ("GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", {**DECODER, "shared_intermediate_size": 0}),
    ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {**DECODER, "head_dim": 16, "attention_bias": True}),
    ("PhimoeConfig", "PhimoeForCausalLM", {**DECODER, **PHI_MOE, "attention_bias": True, "lm_head_bias": True}),
    ("PhimoeConfig", "PhimoeForCausalLM", {**DECODER, **PHI_MOE, "tie_word_embeddings": True}),
    ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {**DECODER, **HUNYUAN_MOE, "attention_bias": True}),
    ("Jais2Config", "Jais2ForCausalLM", {**DECODER, "head_dim": 16, **ENDS}),
    ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**DECODER, **LATENT}),
    ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**DECODER, **LATENT, "q_lora_rank": None, "num_hidden_layers": 3}),
    ("Lfm2Config", "Lfm2ForCausalLM", {**DECODER, "layer_types": ["conv", "full_attention"]}),
    ("Lfm2Config", "Lfm2ForCausalLM", {**DECODER, "full_attn_idxs": [1], "conv_bias": True, **LFM_PLAIN}),
    ("Lfm2Config", "Lfm2ForCausalLM", {**DECODER, "intermediate_size": 400}),
    ("MambaConfig", "MambaForCausalLM", MAMBA),
    ("MambaConfig", "MambaForCausalLM", {**MAMBA, "use_bias": True, "tie_word_embeddings": False}),
    ("T5Config", "T5ForConditionalGeneration", T5),
    ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    ("UMT5Config", "UMT5ForConditionalGeneration", {**T5, "num_decoder_layers": 3}),
    ("UMT5Config", "UMT5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}),
    ("NomicBertConfig", "NomicBertModel", ENCODER),
    ("NomicBertConfig", "NomicBertForMaskedLM", ENCODER),
    ("NomicBertConfig", "NomicBertForMaskedLM", {**ENCODER, "tie_word_embeddings": False}),
    ("ModernBertConfig", "ModernBertModel", {**ENCODER, **MODERN}),
    ("ModernBertConfig", "ModernBertForMaskedLM", {**ENCODER, **MODERN, "tie_word_embeddings": False}),
    *(
        ("ModernBertConfig", f"ModernBert{head}", {**ENCODER, **MODERN})
        for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    ),
    ("BertConfig", "BertModel", ENCODER),
    ("BertConfig", "BertForMaskedLM", ENCODER),
    ("BertConfig", "BertForMaskedLM", {**ENCODER, "tie_word_embeddings": False}),
    ("BertConfig", "BertLMHeadModel", {**ENCODER, "is_decoder": True}),
    *(
        ("BertConfig", f"Bert{head}", {**ENCODER, "num_labels": 3})
        for head in BERT_HEADS
        if head != "ForQuestionAnswering"
    ),
    ("BertConfig", "BertForQuestionAnswering", ENCODER),
    ("DistilBertConfig", "DistilBertModel", DISTIL),
    ("DistilBertConfig", "DistilBertForMaskedLM", DISTIL),
    ("DistilBertConfig", "DistilBertForMaskedLM", {**DISTIL, "tie_word_embeddings": False}),
    ("DistilBertConfig", "DistilBertForQuestionAnswering", DISTIL),
    *(
        ("DistilBertConfig", f"DistilBert{head}", {**DISTIL, "num_labels": 5})
        for head in ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")
    ),
]
ONNX = json.loads((Path(__file__).resolve().parents[1] / "data" / "onnx_models.json").read_text())


def further_cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Classes of the ONNX models, and the other heads of their families, that no case above names."""
    named = {case[1] for case in CASES}
    found = {}
    for model in ONNX["models"]:
        family = next(a.family for a in all_architectures() if model["class"] in a.classes)
        options = {**ONNX["sizes"], **model["config"]}
        for kind in (model["class"], *(a.classes[0] for a in all_architectures() if a.family == family)):
            if kind not in named:
                found.setdefault(kind, (getattr(transformers, kind).config_class.__name__, kind, options))
    return list(found.values())


CASES += further_cases()


def model_of(config_class: str, model_class: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**options))


@pytest.mark.parametrize(("config_class", "model_class", "options"), CASES)
def test_what_transformers_saves_is_understood(
    config_class: str, model_class: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(config_class, model_class, options)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert model_class in checkpoint.architecture.classes
    ignores = checkpoint.architecture.ignores
    held = {tensor.data_ptr(): tensor.numel() for name, tensor in model.state_dict().items() if not ignores(name)}
    parameters = sum(held.values())  # shared parameters count once, as aliases do
    stored = sum(int(np.prod(w.shape)) for w in checkpoint.weights.values() if not isinstance(w, Alias))
    assert stored == parameters
    required = {n for n, i in checkpoint.infos().items() if not i.rule.optional}
    assert required <= set(checkpoint.weights)


@pytest.mark.parametrize(("config_class", "model_class", "options"), [CASES[1], CASES[14], CASES[24]])
def test_values_survive_opening(config_class: str, model_class: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Names, ties and turned matrices, value by value against the live module's parameters."""
    model = model_of(config_class, model_class, options)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    infos = checkpoint.infos()
    state = model.state_dict()
    for name in checkpoint.weights:
        expected = state[name].numpy()
        turned = infos[name].rule.transposed
        np.testing.assert_array_equal(checkpoint.resolve(name).value(), expected.T if turned else expected)


def test_every_row_of_a_table_is_exercised(tmp_path: Path) -> None:
    """No rule of any data file is dead: each names a tensor of some case above."""
    seen: dict[str, set[str]] = {}
    for number, (config_class, model_class, options) in enumerate(CASES):
        folder = tmp_path / str(number)
        model_of(config_class, model_class, options).save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        key = checkpoint.architecture.classes[0]
        infos = checkpoint.infos()
        seen.setdefault(key, set()).update(infos[n].rule.disk for n in checkpoint.weights)
    for architecture in all_architectures():
        assert {rule.disk for rule in architecture.tensors} == seen[architecture.classes[0]], architecture.classes


@pytest.mark.parametrize("architecture", all_architectures(), ids=lambda a: a.classes[0])
def test_roles_and_names_hang_together(architecture: Any) -> None:
    roles = {rule.role for rule in architecture.tensors}
    for fold in architecture.folds:
        assert {r for r in (fold["norm"], *fold["linears"]) if r} <= roles
    assert (architecture.gguf is None) == (architecture.gguf_refusal is not None)
    inside = [r for r in architecture.tensors if "{i}" in r.disk]
    prefixes = (architecture.block_prefix, architecture.decoder_prefix or architecture.block_prefix)
    assert all(r.disk.startswith(prefixes) for r in inside)
    assert all(r.kind != "linear" for r in architecture.tensors if "{i}" not in r.disk)


def test_gguf_names_are_those_of_the_gguf_library() -> None:
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    arch_ids = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    for architecture in all_architectures():
        if architecture.gguf is None:
            continue
        allowed = {TENSOR_NAMES[t] for t in MODEL_TENSORS[arch_ids[architecture.gguf["arch"]]]}
        for rule in architecture.tensors:
            if rule.gguf:
                stem = rule.gguf.removesuffix(".weight").removesuffix(".bias").replace("{i}", "{bid}")
                assert stem in allowed, (architecture.family, rule.gguf)


def test_unknown_architectures_are_exit_3() -> None:
    with pytest.raises(Unsupported, match="RwkvForCausalLM") as caught:
        architecture_for({"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"})
    assert "llama" in (caught.value.hint or "")
    with pytest.raises(Unsupported):  # a known type with a head that nobody mapped
        architecture_for({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"})


def test_features_that_nobody_maps_are_exit_3() -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert", "position_embedding_type": "relative_key"}
    with pytest.raises(Unsupported, match="position_embedding_type"):
        architecture_for(config).check_supported(config)
    for name, key in (("Phi", "qk_layernorm"), ("StableLm", "qk_layernorm"), ("Cohere", "use_qk_norm")):
        config = {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), key: True}
        with pytest.raises(Unsupported, match=key):
            architecture_for(config).check_supported(config)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    architecture_for(config).check_supported(config)
    with pytest.raises(Unsupported, match="in GGUF"):
        architecture_for(config).check_gguf(config)


def test_expressions() -> None:
    hyper = {"heads": 4, "head_dim": 8, "hidden": 64}
    assert literal("heads*head_dim", hyper) == 32
    assert literal("hidden/heads", hyper) == 16
    assert literal("hidden+2*heads*head_dim", hyper) == 128
    with pytest.raises(Malformed, match="nothing"):
        literal("heads*nothing", hyper)


def test_a_number_may_be_repeated_a_layer() -> None:
    assert alternative("moe_topk[]", {"moe_topk": 2}, {}) == 2
    assert alternative("moe_topk[]", {"moe_topk": [2, 2]}, {}) == 2
    assert alternative("moe_topk[]", {}, {}) is None
    with pytest.raises(Unsupported, match="differs by layer"):
        alternative("moe_topk[]", {"moe_topk": [1, 2]}, {})


def test_the_blocks_that_have_a_tensor() -> None:
    """LFM2 as published: kinds by number, MLPs two thirds as wide as said, up to the next multiple of 256."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 96, "norm_eps": 1e-5}
    config = {"model_type": "lfm2", **sizes, "max_position_embeddings": 64, "conv_L_cache": 3, "block_ff_dim": 6656}
    config |= {"full_attn_idxs": [2, 5], "block_auto_adjust_ff_dim": True, "tie_embedding": True}
    architecture = architecture_for(config)
    held = {(info.rule.role, info.block) for info in architecture.expected(config)}
    assert [i for i in range(4) if ("attn_q", i) in held] == [2]
    assert [i for i in range(4) if ("shortconv_conv", i) in held] == [0, 1, 3]
    assert architecture.hyper(config)["ffn"] == 4608
    assert architecture.hyper({**config, "block_auto_adjust_ff_dim": False})["ffn"] == 6656
    everywhere = {key: value for key, value in config.items() if key != "full_attn_idxs"}
    assert not any(info.rule.role == "shortconv_conv" for info in architecture.expected(everywhere))
    with pytest.raises(Malformed, match="tells the kind of 1 layers"):
        architecture.lookup({**config, "layer_types": ["conv"]})


def test_a_config_without_a_needed_key_is_exit_5() -> None:
    architecture = architecture_for({"model_type": "llama"})
    with pytest.raises(Malformed, match="num_hidden_layers"):
        architecture.hyper({"hidden_size": 64})


def test_the_file_name_is_the_family() -> None:
    folder = Path(__file__).resolve().parents[2] / "src/tightship/architectures"
    for path in folder.glob("*.json"):
        if path.name != "schema.json":
            data = json.loads(path.read_text())
            assert build(data)[0].family == path.stem
