"""Opening directories: every form that transformers saves, and the faults that must not pass."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tightship.errors import Malformed, Unsupported, UsageError
from tightship.opening import open_checkpoint
from tightship.weights import Alias, Dense, check_finite

EMBER = Path(__file__).resolve().parents[2] / "examples" / "ember"
TINY = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.fixture
def ember(tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(EMBER, tmp_path / "ember"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_ember() -> None:
    checkpoint = open_checkpoint(EMBER)
    tensors = load_file(EMBER / "model.safetensors")
    assert checkpoint.name == checkpoint.source.identity == "ember"
    assert checkpoint.weights["lm_head.weight"] == Alias("model.embed_tokens.weight")
    for name, tensor in tensors.items():
        weight = checkpoint.weights[name]
        assert isinstance(weight, Dense)
        assert (weight.shape, weight.dtype) == (tuple(tensor.shape), "bf16")
        np.testing.assert_array_equal(weight.value(), tensor.float().numpy())
    assert checkpoint.source.files == tuple(
        (p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(EMBER.iterdir())
    )
    assert set(checkpoint.files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_opening_reads_no_weights_and_no_torch() -> None:
    code = (
        "import sys, numpy as np; np.fromfile = None\n"
        "from tightship.opening import open_checkpoint\n"
        f"open_checkpoint({str(EMBER)!r})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("element_type", [torch.float32, torch.float16, torch.bfloat16])
def test_shards_and_element_types(element_type: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).to(element_type)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(checkpoint.resolve(name).value(), tensor.float().numpy())


@pytest.mark.parametrize("legacy", [True, False])
def test_bin_files(legacy: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4))
    model.config.architectures = ["GPT2LMHeadModel"]
    model.bfloat16()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights["lm_head.weight"] == Alias("transformer.wte.weight")
    np.testing.assert_array_equal(
        checkpoint.resolve("transformer.h.1.attn.c_attn.weight").value(),
        model.transformer.h[1].attn.c_attn.weight.detach().float().numpy().T,
    )


def test_bin_shards(ember: Path) -> None:
    tensors = load_file(ember / "model.safetensors")
    (ember / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({n: tensors[n] for n in part}, ember / file)
        where |= dict.fromkeys(part, file)
    (ember / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    checkpoint = open_checkpoint(ember)
    for name in names:
        np.testing.assert_array_equal(checkpoint.resolve(name).value(), tensors[name].float().numpy())


def test_safetensors_before_bin(ember: Path) -> None:
    (ember / "pytorch_model.bin").write_bytes(b"never looked at")
    assert "pytorch_model.bin" not in [name for name, _, _ in open_checkpoint(ember).source.files]


class TestNames:
    def test_without_the_base_prefix(self, tmp_path: Path) -> None:
        """The first GPT-2 files name `h.0...` although their class is the language model; buffers lie among them."""
        config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4)
        model = transformers.GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path)
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        assert "transformer.h.0.ln_1.weight" in checkpoint.weights
        assert not any(".attn.bias" in name for name in checkpoint.weights)

    def test_base_model_from_a_file_with_the_prefix(self, tmp_path: Path) -> None:
        model = transformers.BertForPreTraining(transformers.BertConfig(**TINY))
        model.save_pretrained(tmp_path)
        edit_config(tmp_path, architectures=["BertModel"])
        checkpoint = open_checkpoint(tmp_path)
        assert "pooler.dense.weight" in checkpoint.weights
        assert not any(name.startswith(("bert.", "cls.")) for name in checkpoint.weights)

    def test_names_of_the_first_bert_files(self, tmp_path: Path) -> None:
        """bert-base-uncased: gamma and beta, a pooler and a sentence head beside the masked language model's."""
        model = transformers.BertForPreTraining(transformers.BertConfig(**TINY))
        model.save_pretrained(tmp_path)
        edit_config(tmp_path, architectures=["BertForMaskedLM"])

        def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            tensors["bert.embeddings.position_ids"] = torch.arange(8)
            return {
                n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
                for n, t in tensors.items()
            }

        rewrite(tmp_path, old)
        checkpoint = open_checkpoint(tmp_path)
        state = model.state_dict()
        for name in checkpoint.weights:
            np.testing.assert_array_equal(checkpoint.resolve(name).value(), state[name].numpy())
        assert not any("pooler" in name or "seq_relationship" in name for name in checkpoint.weights)

    def test_two_tensors_for_one_name(self, ember: Path) -> None:
        def twice(tensors: dict[str, torch.Tensor]) -> None:
            tensors["norm.weight"] = tensors["model.norm.weight"].clone()

        rewrite(ember, twice)
        with pytest.raises(Malformed, match=r"mean model\.norm\.weight"):
            open_checkpoint(ember)


class TestTies:
    def test_equal_copies_become_one(self, ember: Path) -> None:
        rewrite(ember, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
        assert open_checkpoint(ember).weights["lm_head.weight"] == Alias("model.embed_tokens.weight")

    def test_differing_copies_are_exit_5(self, ember: Path) -> None:
        rewrite(ember, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] * 2})
        with pytest.raises(Malformed, match="ties it to") as caught:
            open_checkpoint(ember)
        assert caught.value.tensor == "lm_head.weight"

    def test_only_the_borrower_is_there(self, ember: Path) -> None:
        def moved(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

        rewrite(ember, moved)
        checkpoint = open_checkpoint(ember)
        assert checkpoint.weights["lm_head.weight"] == Alias("model.embed_tokens.weight")
        assert checkpoint.resolve("lm_head.weight").shape == (1024, 256)

    def test_an_untied_model_needs_its_head(self, ember: Path) -> None:
        edit_config(ember, tie_word_embeddings=False)
        with pytest.raises(Malformed, match=r"missing: lm_head\.weight"):
            open_checkpoint(ember)


class TestConfig:
    def test_keys_that_could_run_code_or_hold_paths_are_dropped(self, ember: Path) -> None:
        edit_config(
            ember,
            auto_map={"AutoModel": "evil--code"},
            trust_remote_code=True,
            _name_or_path="/home/someone/model",
            _attn_implementation_internal="someone/kernels",
            vision_config={"trust_remote_code": True, "kept": [{"auto_map": 1, "also": 2}]},
        )
        config = open_checkpoint(ember).config
        assert config["vision_config"] == {"kept": [{"also": 2}]}
        text = json.dumps(config)
        for word in ("auto_map", "trust_remote_code", "_name_or_path", "_attn_implementation"):
            assert word not in text

    def test_keys_of_transformers_4(self, ember: Path) -> None:
        config = json.loads((ember / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
        (ember / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(ember).hyper["hidden"] == 256

    def test_duplicate_keys(self, ember: Path) -> None:
        text = (ember / "config.json").read_text()
        (ember / "config.json").write_text(text.replace("{", '{"hidden_size": 128,', 1))
        with pytest.raises(Malformed, match="'hidden_size' occurs twice"):
            open_checkpoint(ember)

    @pytest.mark.parametrize("section", [{"quant_method": "exl2", "bits": 4}, {"quant_method": "hqq"}])
    def test_quantizations_that_are_not_read_are_exit_3(self, ember: Path, section: dict[str, Any]) -> None:
        edit_config(ember, quantization_config=section)
        with pytest.raises(Unsupported, match=section["quant_method"]):
            open_checkpoint(ember)

    def test_weights_of_another_config(self, ember: Path) -> None:
        edit_config(ember, intermediate_size=512)
        with pytest.raises(Malformed, match=r"shape \(768, 256\) where config.json says \(512, 256\)"):
            open_checkpoint(ember)

    def test_more_layers_than_weights(self, ember: Path) -> None:
        edit_config(ember, num_hidden_layers=3)
        with pytest.raises(Malformed, match=r"9 tensors .* are missing"):
            open_checkpoint(ember)

    def test_a_tensor_that_nobody_knows(self, ember: Path) -> None:
        rewrite(ember, lambda t: {**t, "model.layers.0.extra.weight": torch.ones(3)})
        with pytest.raises(Malformed, match=r"not known: model\.layers\.0\.extra\.weight"):
            open_checkpoint(ember)


class TestSources:
    @pytest.mark.parametrize("source", ["no-such-model", "./no/such", "/no/such/dir", "a/b/c", "org/na me", ""])
    def test_neither_path_nor_hub_id(self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError) as caught:
            open_checkpoint(source)
        assert caught.value.exit_code == 2

    def test_a_path_with_a_typo_is_no_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="neither"):
            open_checkpoint("models/ember")

    def test_a_revision_of_a_directory(self) -> None:
        with pytest.raises(UsageError, match="revision"):
            open_checkpoint(EMBER, revision="main")

    def test_a_file_that_is_no_source(self) -> None:
        with pytest.raises(UsageError, match="is a single file"):
            open_checkpoint(EMBER / "model.safetensors")

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"config\.json"):
            open_checkpoint(tmp_path)

    def test_no_weights(self, ember: Path) -> None:
        (ember / "model.safetensors").unlink()
        with pytest.raises(UsageError, match="no weights"):
            open_checkpoint(ember)
        (ember / "tf_model.h5").write_bytes(b"x")
        with pytest.raises(Unsupported, match=r"tf_model\.h5"):
            open_checkpoint(ember)


class TestFiles:
    def test_a_hub_cache_is_symlinks(self, ember: Path, tmp_path: Path) -> None:
        cache = tmp_path / "models--org--ember"
        snapshot = cache / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for file in ember.iterdir():
            blob = cache / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            file.rename(blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        assert len(open_checkpoint(snapshot).weights) == 21

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_links_that_lead_outside(self, ember: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "outside").mkdir()
        (ember / name).rename(tmp_path / "outside" / name)
        (ember / name).symlink_to(tmp_path / "outside" / name)
        with pytest.raises(Malformed, match="outside its directory"):
            open_checkpoint(ember)

    def test_a_pipe_is_no_file(self, ember: Path) -> None:
        (ember / "tokenizer.model").unlink(missing_ok=True)
        os.mkfifo(ember / "tokenizer.model")
        with pytest.raises(Malformed, match="not a regular file"):
            open_checkpoint(ember)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json"])
    def test_lfs_pointers(self, ember: Path, name: str) -> None:
        (ember / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
        with pytest.raises(Malformed, match="LFS pointer") as caught:
            open_checkpoint(ember)
        assert "git lfs pull" in (caught.value.hint or "")

    def test_only_listed_files_are_taken(self, ember: Path) -> None:
        for name in ("modeling_evil.py", "optimizer.pt", "notes.txt", "chat_template.jinja", "merges.txt"):
            (ember / name).write_text("x")
        (ember / "1_Pooling").mkdir()
        (ember / "1_Pooling/config.json").write_text("{}")
        taken = set(open_checkpoint(ember).files)
        assert {"chat_template.jinja", "merges.txt", "1_Pooling/config.json"} <= taken
        assert not {"modeling_evil.py", "optimizer.pt", "notes.txt", "config.json"} & taken

    def test_a_small_file_that_is_huge(self, ember: Path) -> None:
        with (ember / "tokenizer.json").open("r+b") as file:
            file.truncate(1 << 40)  # sparse: no disk is used
        with pytest.raises(Malformed, match="limit"):
            open_checkpoint(ember)


def test_check_finite() -> None:
    whole = np.zeros((3, 1 << 20), np.float16)
    assert check_finite("w", whole) is whole
    whole[2, 7] = np.inf
    with pytest.raises(Malformed, match=f"1 of {3 << 20} elements .* flat index {(2 << 20) + 7}") as caught:
        check_finite("w", whole)
    assert caught.value.tensor == "w"
    assert check_finite("i", np.array([1, 2])).dtype == np.int64
