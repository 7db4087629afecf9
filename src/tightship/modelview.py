"""A checkpoint as a torch module: the only place that makes one.

Names in a `Checkpoint` are the on-disk ones. transformers renames and fuses on loading (Mixtral's experts become one
3-D parameter), so loading goes through transformers' own conversion and this module keeps the books: every tensor
that is given must land, and every parameter must have been given.

Arithmetic is float32, attention and experts are the plain ("eager") implementations, dropout is off. (Eager
attention adds Falcon's ALiBi twice: `Architecture.attention` says where it is not the one.) That is "the original" of
docs/contract.md when the weights are the source's, and "the compressed checkpoint" when they are packed ones, decoded
by `Weight.value()`.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightship.checkpoint import Checkpoint
from tightship.errors import Malformed, Unsupported
from tightship.per_layer import has_unlike_layers, shared_config, unlike_layers
from tightship.weights import Alias, Stored

if TYPE_CHECKING:
    import torch

# Keys of config.json that would start code, kernels or quantizers of their own; none says what the model computes.
_CONFIG_KEYS_LEFT_OUT = frozenset(
    {
        "_attn_implementation",
        "_experts_implementation",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "fusion_config",
        "quantization_config",
        "transformers_weights",
    }
)
_ROWS_AT_ONCE = 8
_PIXEL_AXES = 4


class ModelView:
    """The torch side of one checkpoint. Built on first use, then kept.

    Args:
        checkpoint: the model at rest; its weights may be packed.
        threads: torch threads while this view computes, or None to leave the process setting alone.
        device: `cpu` or `cuda`; where the module lives.
        folder: where the weights lie in files that are mapped into memory (`tightship.mapped`), for models that do not
            fit; None keeps them in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        device: str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.threads = threads
        self.device = device
        self._module: Any = None
        self._warm = False

    def module(self) -> Any:
        """The whole model: float32, eager, eval, ties honoured. The same object at every call.

        Changing its parameters in place does not touch the checkpoint.

        Raises:
            Malformed: tensors missing, unexpected, of another shape, or swallowed on the way; named.
            Unsupported: transformers has no such class.
        """
        if self._module is None:
            self._module = self._build().to(self.device)
        return self._module

    def _build(self) -> Any:
        if self.folder is None:
            return build_module(self.checkpoint, self._tensors())
        from tightship.mapped import mapped_module

        return mapped_module(self.checkpoint, self.folder)

    def outputs(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        decoder_input_ids: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the model on `input_ids` (batch, sequence) int64, a few rows at a time.

        Behind an encoder a decoder is given `decoder_input_ids` (batch, length), by default the input once more: its
        start token, then all but the last. Models of images take `pixel_values` (batch, channels, height, width)
        float32 in the place of `input_ids`, and nothing else.

        Returns float32 arrays: `logits` (batch, sequence, vocabulary), or (batch, labels) for classifiers, and
        `last_hidden_state` (batch, sequence, hidden) for encoders; masked language models give both.
        """
        import torch

        module = self.module()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if module.config.is_encoder_decoder:
            given_ids = shifted(input_ids, self.checkpoint.config) if decoder_input_ids is None else decoder_input_ids
            inputs["decoder_input_ids"] = given_ids
        given = {k: torch.from_numpy(np.asarray(v, np.int64)) for k, v in inputs.items() if v is not None}
        if input_ids.ndim == _PIXEL_AXES:
            given = {"pixel_values": torch.from_numpy(np.asarray(input_ids, np.float32))}
        parts: dict[str, list[np.ndarray]] = {}
        with self.computing():
            if not self._warm:
                # Under load a process's first pass came out some 1e-5 off (relative), all later ones bit for bit equal.
                self._forward(module, {k: v[:1].to(self.device) for k, v in given.items()})
                self._warm = True
            for start in range(0, len(input_ids), _ROWS_AT_ONCE):
                batch = {k: v[start : start + _ROWS_AT_ONCE].to(self.device) for k, v in given.items()}
                for key, value in self._forward(module, batch).items():
                    parts.setdefault(key, []).append(value.float().cpu().numpy())
        return {key: np.concatenate(values) for key, values in parts.items()}

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """No gradients, and this view's thread count, for the duration."""
        import torch

        before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_num_threads(before)

    def _forward(self, module: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masked = self.checkpoint.architecture.task == "fill-mask"
        cache = {"use_cache": False} if hasattr(module.config, "use_cache") and module.can_generate() else {}
        found = module(**batch, **cache, output_hidden_states=masked, return_dict=True)
        wanted = {key: found[key] for key in ("logits", "last_hidden_state") if key in found}
        if masked and "last_hidden_state" not in wanted:
            wanted["last_hidden_state"] = found["hidden_states"][-1]
        return wanted

    def _tensors(self) -> dict[str, np.ndarray]:
        """`disk_value` of every tensor; aliases share their owner's array."""
        owners = {name: owner_of(self.checkpoint, name) for name in disk_names(self.checkpoint)}
        arrays = {owner: disk_value(self.checkpoint, owner) for owner in sorted(set(owners.values()))}
        return {name: arrays[owner] for name, owner in owners.items()}


def start_token(config: Mapping[str, Any]) -> int:
    """What a decoder behind an encoder begins with, as transformers reads config.json: else its padding, else 0."""
    found = (config.get(key) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    return next((int(token) for token in found if token is not None), 0)


def shifted(ids: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """What a decoder is given behind an encoder of `ids` (batch, sequence): its start token, then all but the last.

    Both stacks see the same text, so that one array of ids asks for logits at every position.
    """
    return np.concatenate([np.full_like(ids[:, :1], start_token(config)), ids[:, :-1]], axis=1)


def disk_names(checkpoint: Checkpoint) -> list[str]:
    """Names that take part in the computation: all but those the family's data lists as ignored."""
    ignored = checkpoint.architecture.ignored
    return [name for name in checkpoint.weights if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]


def disk_value(checkpoint: Checkpoint, name: str, written: Mapping[str, Stored] | None = None) -> np.ndarray:
    """A fresh float32 array as stored on disk (Conv1D matrices turned back), aliases followed.

    `written` holds weights that take the place of the checkpoint's.
    """
    owner = owner_of(checkpoint, name)
    weight = (written or {}).get(owner) or checkpoint.resolve(owner)
    info = checkpoint.infos().get(name)
    value = weight.value()
    return np.array(value.T if info is not None and info.rule.transposed else value, np.float32, order="C")


def owner_of(checkpoint: Checkpoint, name: str) -> str:
    """The name under which the data of `name` is stored.

    Raises:
        Malformed: aliases run in a circle or into nothing.
    """
    checkpoint.resolve(name)
    weight = checkpoint.weights[name]
    while isinstance(weight, Alias):
        name = weight.owner
        weight = checkpoint.weights[name]
    return name


def build_module(checkpoint: Checkpoint, arrays: Mapping[str, np.ndarray]) -> Any:
    """transformers' module of a checkpoint, filled with `arrays` (on-disk names and orientation), books checked.

    Raises:
        Malformed, Unsupported: see `ModelView.module`.
    """
    import torch

    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module, info = load_module(checkpoint, state)
    _check_books(checkpoint, module, info, state)
    return module


def load_module(checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]) -> tuple[Any, Mapping[str, Any]]:
    """`from_pretrained` on tensors in memory: the module in eval mode, and what transformers missed or did not expect.

    Raises:
        Malformed: shapes that differ, or experts that cannot be stacked.
        Unsupported: transformers has no such class.
    """
    import torch

    model_class = _model_class(checkpoint)
    with _quiet():
        try:
            module, info = model_class.from_pretrained(
                None,
                config=_config(shared_config(checkpoint.config)),
                state_dict=dict(state),
                dtype=torch.float32,
                attn_implementation=checkpoint.architecture.attention(checkpoint.config),
                experts_implementation="eager",
                output_loading_info=True,
                **_left_out(checkpoint, state),
            )
        except RuntimeError as error:
            raise Malformed(
                f"transformers cannot load these tensors into {model_class.__name__}: {_first_line(error)}",
                hint="a tensor is missing, surplus, or of another shape than config.json says",
            ) from error
    return module.eval(), info


def _left_out(checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Words for the class that keep it from making what the checkpoint does without: an encoder's optional pooler."""
    poolers = [name for name, i in checkpoint.infos().items() if i.rule.role == "pooler" and i.rule.optional]
    return {} if not poolers or any(name in state for name in poolers) else {"add_pooling_layer": False}


def _check_books(
    checkpoint: Checkpoint, module: Any, info: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    faults = [f"missing: {', '.join(missing[:8])}"] if missing else []
    faults += [f"unexpected: {', '.join(unexpected[:8])}"] if unexpected else []
    faults += [str(error) for error in info["error_msgs"]]
    if faults:
        raise Malformed(
            f"{type(module).__name__} and the checkpoint do not match; {'; '.join(faults)}",
            tensor=(missing or unexpected or [None])[0],
            hint="the weights and config.json do not belong together",
        )
    # transformers keeps lists of names that it drops or makes up without a word; counting elements sees those too.
    given = _elements(state.values())
    held = _elements(t for name, t in module.state_dict().items() if not checkpoint.architecture.ignores(name))
    if given != held:
        raise Malformed(
            f"{type(module).__name__} holds {held} elements, the checkpoint gave {given}: "
            "some tensors were dropped, made up or tied on loading",
            hint="compare tie_word_embeddings in config.json with the stored tensors",
        )


def _elements(tensors: Any) -> int:
    """Elements of distinct tensors; shared storage counts once."""
    return sum({(t.data_ptr(), t.shape): t.numel() for t in tensors}.values())


def _config(config: Mapping[str, Any]) -> Any:
    """The config class's object of a raw config.json. No code is fetched and none comes from the file."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kept = {key: value for key, value in config.items() if key not in _CONFIG_KEYS_LEFT_OUT}
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(kept)
    except KeyError as error:
        raise Unsupported(f"this transformers has no model type {config.get('model_type')!r}") from error
    except StrictDataclassError as error:
        raise Unsupported(f"transformers refuses config.json: {_first_line(error)}") from error


def _model_class(checkpoint: Checkpoint) -> Any:
    """The class that config.json names, if the family's data lists it; the family's for names of old files."""
    import transformers

    known = checkpoint.architecture.classes
    named = [c for c in checkpoint.config.get("architectures") or [] if c in known]
    found = next((getattr(transformers, c) for c in (*named, *known) if hasattr(transformers, c)), None)
    if found is None:
        raise Unsupported(f"this transformers has no class {known[0]}", hint="install a transformers that has it")
    return unlike_layers(found, checkpoint.config) if has_unlike_layers(checkpoint.config) else found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or load reports of transformers on stderr; what they say is checked here instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
