"""Export configs in optimum's manner: which inputs a model takes, their axes, and dummies to trace with.

They are registered with optimum's TasksManager under the backend `tightship`, one for each task and model type that the
architecture data know; optimum's input generators make the dummies.
"""

from __future__ import annotations

import functools
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedTextConfig, NormalizedVisionConfig
from optimum.utils.input_generators import DummyInputGenerator, DummyTextInputGenerator, DummyVisionInputGenerator

from tightship.architecture import all_architectures
from tightship.exporters.onnx_candidates.skeleton import BATCH, DECODER_TASKS, HEADS, IMAGES, PAST, SEQUENCE, TOTAL

BACKEND = "tightship"
# No size may be 0 or 1 while tracing: torch.export would take it for a constant.
DUMMY_SHAPES = {"batch_size": 2, "sequence_length": 3}
PAST_LENGTH = 5
Axes = dict[int, str]


class CacheGenerator(DummyInputGenerator):
    """A past of `PAST_LENGTH` tokens; heads and head size of each layer come from the model itself."""

    SUPPORTED_INPUT_NAMES = ("past_key_values",)

    def __init__(self, task: str, normalized_config: Any, batch_size: int = 2, **_: Any) -> None:
        self.task = task
        self.batch_size = batch_size
        self.heads = normalized_config.cache_heads

    def generate(self, input_name: str, framework: str = "pt", int_dtype: str = "", float_dtype: str = "fp32") -> Any:
        """One (key, value) pair a layer; `input_name` and `int_dtype` are optimum's signature."""
        del input_name, int_dtype
        return [
            tuple(
                self.random_float_tensor(
                    [self.batch_size, heads, PAST_LENGTH, size], framework=framework, dtype=float_dtype
                )
                for heads, size in pair
            )
            for pair in self.heads
        ]


class TotalMaskGenerator(DummyTextInputGenerator):
    """Text inputs whose attention mask covers the past, too."""

    def generate(
        self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
    ) -> Any:
        """See optimum's DummyTextInputGenerator."""
        if input_name == "attention_mask":
            shape = [self.batch_size, self.sequence_length + PAST_LENGTH]
            return self.random_int_tensor(shape, max_value=2, min_value=1, framework=framework, dtype=int_dtype)
        return super().generate(input_name, framework, int_dtype, float_dtype)


class DecoderExportConfig(ExporterConfig):
    """A decoder with its KV cache: the contract of `skeleton`."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (TotalMaskGenerator, CacheGenerator)

    def __init__(self, config: Any, task: str, *, cache_heads: list[Any], **options: Any) -> None:
        super().__init__(config, task, **options)
        self._normalized_config = NormalizedTextConfig(config, allow_new=True, cache_heads=cache_heads)
        self._normalized_config.cache_heads = cache_heads

    @property
    def inputs(self) -> dict[str, Axes]:
        """Axes of each input; those of the past are for every key and value."""
        return {
            "input_ids": {0: BATCH, 1: SEQUENCE},
            "attention_mask": {0: BATCH, 1: TOTAL},
            "position_ids": {0: BATCH, 1: SEQUENCE},
            "past_key_values": {0: BATCH, 2: PAST},
        }


class EncoderExportConfig(ExporterConfig):
    """An encoder; token types where the model has a table for them."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    @property
    def inputs(self) -> dict[str, Axes]:
        """Axes of each input."""
        names = ["input_ids", "attention_mask"]
        if getattr(self._config, "type_vocab_size", 0):
            names.append("token_type_ids")
        return {name: {0: BATCH, 1: SEQUENCE} for name in names}


class ImageExportConfig(ExporterConfig):
    """A classifier of images; height and width are those of the position table."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    @property
    def inputs(self) -> dict[str, Axes]:
        """Axes of each input."""
        return {"pixel_values": {0: BATCH}}


@functools.cache
def register_configs() -> None:
    """Tell optimum's TasksManager about every model type and task of the architecture data."""
    register = TasksManager.create_register(BACKEND)
    for architecture in all_architectures():
        for model_type in architecture.model_types:
            if architecture.task in DECODER_TASKS:
                register(model_type, architecture.task)(DecoderExportConfig)
            elif architecture.task == IMAGES:
                register(model_type, architecture.task)(ImageExportConfig)
            elif architecture.task in HEADS:
                register(model_type, architecture.task)(EncoderExportConfig)


def export_config(model_type: str, task: str) -> Any:
    """Constructor of the config of a model type and task.

    Raises:
        ValueError: optimum's own, for a pair that is not registered.
    """
    register_configs()
    return TasksManager.get_exporter_config_constructor(
        BACKEND, model_type=model_type, task=task, library_name="transformers"
    )
