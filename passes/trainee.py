"""A checkpoint as a torch module whose trained tensors come from leaves: differentiable from leaf to loss.

Parameters are put together anew in every pass, so that stacked experts, turned matrices and shared tensors need no
special case: each stored tensor goes to wherever transformers keeps it (`tightship.addresses`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tightship.addresses import Address, skeleton
from tightship.checkpoint import Checkpoint
from tightship.modelview import ModelView, disk_names, owner_of
from tightship.passes.base import Run
from tightship.passes.leaves import Leaf, leaf_of
from tightship.weights import Stored

if TYPE_CHECKING:
    import torch


class Assembly:
    """Puts leaves (by the name their data is stored under) where a module has its parameters.

    Attributes:
        tensors: what the optimizer changes, by name.
    """

    def __init__(
        self, checkpoint: Checkpoint, module: Any, addresses: Mapping[str, Address], leaves: Mapping[str, Leaf]
    ) -> None:
        self.tensors = {f"{name}/{part}": t for name, leaf in leaves.items() for part, t in leaf.tensors.items()}
        self._leaves = dict(leaves)
        self._module = module
        self._places: dict[str, list[tuple[Address, str, bool]]] = {}
        infos, seen = checkpoint.infos(), set()
        for name in disk_names(checkpoint):
            owner, address = owner_of(checkpoint, name), addresses[name]
            where = (address.parameter, str(address.index))
            if owner in leaves and where not in seen:
                seen.add(where)
                turned = address.turned != (name in infos and infos[name].rule.transposed)
                self._places.setdefault(address.parameter, []).append((address, owner, turned))

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter that a leaf has a part in, by its name in the module; gradients reach the leaves."""
        values = {name: leaf.value() for name, leaf in self._leaves.items()}
        return {parameter: self._one(parameter, parts, values) for parameter, parts in self._places.items()}

    def weights(self) -> dict[str, Stored]:
        """The trained tensors in their stored form, by on-disk name."""
        return {name: leaf.weight() for name, leaf in self._leaves.items()}

    def _one(
        self, parameter: str, parts: list[tuple[Address, str, bool]], values: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        address, name, turned = parts[0]
        if len(parts) == 1 and not address.index:
            return values[name].T if turned else values[name]
        whole = self._module.get_parameter(parameter).clone()
        for address, name, turned in parts:
            whole[address.index] = values[name].T if turned else values[name]
        return whole


class Trainee:
    """The whole model of `checkpoint` with `leaves` in place of their tensors.

    Attributes:
        module: transformers' module; its own parameters are frozen and keep the checkpoint's values.
        tensors: what the optimizer changes, by name.
    """

    def __init__(self, checkpoint: Checkpoint, leaves: Mapping[str, Leaf], run: Run) -> None:
        self.checkpoint = checkpoint
        self.module = ModelView(checkpoint, threads=run.threads, device=run.device).module()
        self.module.requires_grad_(False)
        self._assembly = Assembly(checkpoint, self.module, skeleton(checkpoint)[1], leaves)
        self.tensors = self._assembly.tensors

    def __call__(self, **inputs: Any) -> Any:
        """The module's output; `output_hidden_states` and `output_attentions` are passed on."""
        import torch

        cache = {"use_cache": False} if self.module.can_generate() else {}
        return torch.func.functional_call(self.module, self._assembly.parameters(), (), {**inputs, **cache})

    def weights(self) -> dict[str, Stored]:
        """The trained tensors in their stored form, by on-disk name."""
        return self._assembly.weights()


def every_leaf(
    checkpoint: Checkpoint,
    run: Run,
    wanted: Callable[[str], bool] = lambda _: True,
    *,
    rank: int | None = None,
) -> dict[str, Leaf]:
    """A leaf for every stored tensor that `wanted` says yes to; zeros of the blocks' matrices stay zero.

    With `rank`, matrices of the blocks get a low-rank change; other tensors none at all.
    """
    linears = {info.name for info in checkpoint.linears()}
    names = sorted({owner_of(checkpoint, name) for name in disk_names(checkpoint)})
    return {
        name: leaf_of(checkpoint.resolve(name), run.device, hold_zeros=name in linears, rank=rank, seed=run.seed + n)
        for n, name in enumerate(names)
        if wanted(name) and (rank is None or name in linears)
    }
