"""Static scales of activations against torch's own observers, and formulas by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tightship.activations import SCHEMES, fixed, scheme_of
from tightship.errors import UsageError
from tightship.opening import open_checkpoint
from tightship.passes import pass_for
from tightship.passes.activation_ranges import Ranges
from tightship.passes.base import Run

TEXT = ("The harbour lay quiet. Two boats came in at dawn, and the men carried the nets ashore. " * 12,)


def filled(x: np.ndarray) -> Ranges:
    """Values added in four unequal pieces, so that the histogram grows on the way."""
    ranges = Ranges()
    for part in np.split(x, [10, 300, 5000]):
        ranges.add(part)
    return ranges


def test_affine_parameters_by_hand() -> None:
    """[-1, 4] in 256 steps: S = 5 / 255, Z = round(-128 + 1 / S) = -77; 0.0 is Z, -1 is -128, 4 is 127."""
    asym = fixed("int8-static-asym", -1.0, 4.0)
    assert asym.scale == pytest.approx(5 / 255)
    assert asym.zero_point == -77
    assert [round(x / asym.scale) + asym.zero_point for x in (-1.0, 0.0, 4.0)] == [-128, -77, 127]
    assert fixed("int8-static", -1.0, 4.0).scale == pytest.approx(4 / 127)
    assert fixed("fp8-static", -896.0, 4.0).scale == 2
    assert fixed("nvfp4-local", -1.0, 0.5).scale == 448 * 6
    assert fixed("int8-static-asym", 2.0, 4.0).zero_point == -128  # the range is widened to hold 0.0
    assert fixed("int8-static-asym", 0.0, 0.0).scale == 1
    with pytest.raises(UsageError, match="did you mean"):
        scheme_of("int8-dynamik")


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_is_torchs_observer(symmetric: bool) -> None:
    x = np.random.default_rng(0).normal(0.4, 1, 20_000).astype(np.float32)
    kind = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.qint8, qscheme=kind, quant_min=-128, quant_max=127)
    observer(torch.from_numpy(x))
    scale, zero = observer.calculate_qparams()
    ours = fixed("int8-static" + "-asym" * (not symmetric), *filled(x).span("minmax", 1, symmetric=symmetric))
    if symmetric:  # torch divides by 127.5
        assert ours.scale == pytest.approx(float(scale) * 127.5 / 127, rel=1e-6)
    else:
        assert ours.scale == pytest.approx(float(scale), rel=1e-6)
        assert ours.zero_point == int(zero)


@pytest.mark.parametrize("share", [0.99, 0.999])
def test_percentile_is_numpys(share: float) -> None:
    x = np.random.default_rng(1).standard_t(4, 100_000).astype(np.float32)
    step = 2 * filled(x).reach / 4096
    low, high = filled(x).span("percentile", share, symmetric=True)
    assert high == -low
    assert high == pytest.approx(np.quantile(np.abs(x), share), abs=step)
    low, high = filled(x).span("percentile", share, symmetric=False)
    tail = (1 - share) / 2
    assert low == pytest.approx(np.quantile(x, tail), abs=step)
    assert high == pytest.approx(np.quantile(x, 1 - tail), abs=step)


def test_entropy_cuts_outliers_and_nothing_else() -> None:
    rng = np.random.default_rng(2)
    even = rng.uniform(-1, 1, 50_000).astype(np.float32)
    low, high = filled(even).span("entropy", 1, symmetric=True)
    assert high > 0.95
    lonely = np.concatenate([rng.normal(0, 1, 200_000), [40.0]]).astype(np.float32)
    low, high = filled(lonely).span("entropy", 1, symmetric=True)
    assert 3 < high < 20
    assert low == -high


def test_histogram_counts_every_value() -> None:
    x = np.random.default_rng(3).normal(size=6000).astype(np.float32)
    ranges = filled(x)
    expected, _ = np.histogram(x, bins=4096, range=(-ranges.reach, ranges.reach))
    assert ranges.counts.sum() == len(x)
    assert np.abs(ranges.counts - expected).sum() <= 4  # a value on an edge may be counted beside it


def test_static_scales_are_what_hooks_in_transformers_see(qwen: Path) -> None:
    """Inputs of every linear and rotated keys, by hooks on the decoded model, over the same windows."""
    import transformers

    from tightship.modelview import ModelView
    from tightship.passes.calibration import calibration_windows

    checkpoint = open_checkpoint(qwen)
    run = Run(texts=TEXT, tokens=256, sequence=64)
    step = pass_for("quantize", {"layout": "int8-channel", "activations": "int8-static", "kv_cache": "fp8"}, "p", Path)
    solved = step.apply(checkpoint, run)
    outline = step.outline(checkpoint)
    assert outline.activations.keys() == solved.activations.keys()
    assert {a.scale for a in outline.activations.values()} == {None}
    model = ModelView(solved).module()
    seen: dict[str, float] = {}

    def watch(name: str) -> None:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()))

        model.get_submodule(name).register_forward_pre_hook(hook)

    for info in checkpoint.linears():
        watch(info.name.removesuffix(".weight"))
    for window in calibration_windows(checkpoint, run):
        with torch.no_grad():
            past = model(torch.from_numpy(np.asarray(window))[None], use_cache=True).past_key_values
        for index, layer in enumerate(past.layers):
            for word, tensor in (("k_scale", layer.keys), ("v_scale", layer.values)):
                key = f"model.layers.{index}.self_attn.{word}"
                seen[key] = max(seen.get(key, 0.0), float(tensor.abs().max()))
    assert isinstance(model, transformers.PreTrainedModel)
    for name, largest in seen.items():
        limit = 448 if name.endswith("_scale") else 127
        assert solved.activations[name].scale == pytest.approx(largest / limit, rel=1e-5), name


def test_a_dynamic_scheme_needs_no_calibration(qwen: Path) -> None:
    step = pass_for("quantize", {"layout": "int8-channel", "activations": "int8-dynamic-asym"}, "p", Path)
    assert step.needs == "nothing"
    solved = step.apply(open_checkpoint(qwen), Run())
    assert {a.scheme for a in solved.activations.values()} == {"int8-dynamic-asym"}
    assert "lm_head" not in solved.activations
    assert all(word in SCHEMES for word in ("int8-dynamic-asym", "fp8-static"))
