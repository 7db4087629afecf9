"""Numbered tensors, moved about by hand in the ways a loader moves them, are found again."""

from __future__ import annotations

import numpy as np
import pytest

from tightship.addresses import Address, find_numbers, numbered
from tightship.errors import Unsupported

torch = pytest.importorskip("torch")


def module_with(**parameters: object) -> object:
    module = torch.nn.Module()
    for name, tensor in parameters.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    return module


def test_whole_turned_fused_and_stacked_tensors() -> None:
    shape = dict.fromkeys(range(1, 8), (3, 5))
    shape[2] = (4, 5)
    n = {number: numbered(size, number) for number, size in shape.items()}
    module = module_with(
        plain=n[1].clone(),
        fused=torch.cat([n[2], n[3]]),
        turned=n[4].T.clone(),
        stacked=torch.stack([torch.cat([n[5], n[6]]), torch.cat([n[7], n[1] + 7])]),
        vector=numbered((6,), 9),
        scalar=numbered((), 10),
        kernel=numbered((4, 1, 3), 11).clone(),
        other=torch.full((2, 2), 99.0),
    )
    found = find_numbers(module, {number: f"t{number}" for number in [*range(1, 12)]})
    assert found == {
        "t1": Address("plain"),
        "t2": Address("fused", (slice(0, 4),)),
        "t3": Address("fused", (slice(4, 7),)),
        "t4": Address("turned", (), True),
        "t5": Address("stacked", (0, slice(0, 3))),
        "t6": Address("stacked", (0, slice(3, 6))),
        "t7": Address("stacked", (1, slice(0, 3))),
        "t8": Address("stacked", (1, slice(3, 6))),
        "t9": Address("vector"),
        "t10": Address("scalar"),
        "t11": Address("kernel", (slice(None),)),
    }
    assert found["t11"].view(module).shape == (4, 1, 3)
    assert found["t6"].factor == ("stacked", 0)
    assert found["t3"].factor == ("fused", None)
    for number in (1, 2, 4, 6):
        view = found[f"t{number}"].view(module)
        np.testing.assert_array_equal(view.numpy(), n[number].numpy())
    found["t4"].view(module)[0, 1] = -1
    assert module.turned[1, 0] == -1


def test_matrices_side_by_side_are_not_understood() -> None:
    mixed = torch.cat([numbered((3, 5), 1), numbered((3, 5), 2)], dim=1)
    with pytest.raises(Unsupported, match="weird"):
        find_numbers(module_with(weird=mixed), {1: "a", 2: "b"})


def test_numbered_tensors_take_no_room() -> None:
    assert numbered((4096, 64), 3).untyped_storage().nbytes() == 64 * 4
