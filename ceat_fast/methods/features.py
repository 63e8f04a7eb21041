"""Intermediate features of any model, by the name of a submodule.

Layers of different architectures correspond by relative depth: the layer at depth d in [0, 1) of a model with L layers
is the one with the index floor(d * L), in the order of `named_modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ceat_fast.choices import unknown_name
from ceat_fast.ensemble import Ensemble
from ceat_fast.ensemble.architecture import group_members
from ceat_fast.ensemble.execution import AUTO
from ceat_fast.ensemble.memory_format import ChannelsLast

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Reached(Exception):
    """Ends a forward pass at the layer whose output it carries."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def feature_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose outputs are taken as features.

    Those are the normalisation layers, whose outputs come before the activation and are alike in scale, or the
    convolutions of a model without normalisation; and the linear layers, of which the last one gives the logits.

    Raises:
        ValueError: the model has no such layer.
    """
    modules = dict(model.named_modules())
    kinds = _NORMS if any(isinstance(module, _NORMS) for module in modules.values()) else _CONVOLUTIONS
    names = [name for name, module in modules.items() if isinstance(module, (*kinds, nn.Linear))]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no normalisation, convolution or linear layer to take features from; "
            "name modules of it in `layers`"
        )
    return names


def layers_at(models: Sequence[nn.Module], depth: float, names: Sequence[str] | None = None) -> list[str]:
    """The layer at relative depth `depth`, in [0, 1), of each model.

    Args:
        models: the members.
        depth: 0 is the first layer.
        names: choose among these, in this order, instead of `feature_layers`; every model must have them.

    Raises:
        ValueError: a model without a layer of one of these names.
    """
    chosen = []
    for index, model in enumerate(models):
        layers = feature_layers(model) if names is None else list(names)
        unknown = set(layers) - dict(model.named_modules()).keys()
        if unknown:
            known = [name for name, _ in model.named_modules() if name]
            raise ValueError(unknown_name(f"layer of member {index}", min(unknown), known))
        chosen.append(layers[int(depth * len(layers))])
    return chosen


def features(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Output of the submodule `layer` for the input x, (B, ...); the forward pass ends there.

    Raises:
        ValueError: the forward pass does not come to that submodule.
    """

    def stop(output: Tensor) -> Tensor:
        raise _Reached(output)

    with replaced_output(model, layer, stop):
        try:
            model(x)
        except _Reached as reached:
            return reached.features
    raise ValueError(f"the forward pass of {type(model).__name__} does not run its layer {layer!r}")


class MemberFeatures:
    """Features of several members of an ensemble, each at its own layer.

    Members of one architecture with the same layer run as one where the ensemble runs its members by vmap. For that
    their tensors are copied once; the ensemble's own stay where they are, since CUDA graphs may hold their addresses.

    Args:
        ensemble: whose members; frozen, so that their tensors stay the same while this is used.
        layers: one layer per member of the ensemble.
        members: the members to run; all by default.
    """

    def __init__(self, ensemble: Ensemble, layers: Sequence[str], members: Sequence[int] | None = None) -> None:
        chosen = range(len(ensemble.members)) if members is None else members
        self._ensemble = ensemble
        self._parts = [_UpTo(ensemble.members[m], layers[m]) for m in chosen]
        self._stacks: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._refused = False  # vmap cannot run these members
        self._format = ChannelsLast()

    def __len__(self) -> int:
        return len(self._parts)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """One input batch for each of the J members, (J, B, ...) -> J tensors (B, ...)."""
        execution = self._ensemble.execution(x.device)
        if execution.members == "vmap" and not self._refused:
            try:
                return self._grouped(x)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if self._ensemble.backend != AUTO:
                    raise
                self._refused = True
        with self._ensemble.convolutions(execution, x.device):
            if not execution.on_channels_last:
                return self._run_each(x.unbind())
            return self._format.run(self._run_each, x.unbind(), self._ensemble, own=self._ensemble.is_view)

    def _run_each(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return [part(row) for part, row in zip(self._parts, rows, strict=True)]

    def _grouped(self, x: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group in group_members(self._parts):
            outputs = self._batched(group, x) if len(group) > 1 else [self._parts[group[0]](x[group[0]])]
            found.update(zip(group, outputs, strict=True))
        return [found[number] for number in range(len(self._parts))]

    def _batched(self, group: Sequence[int], x: Tensor) -> Sequence[Tensor]:
        parts, key = [self._parts[number] for number in group], tuple(group)
        if key not in self._stacks:
            parameters, buffers = torch.func.stack_module_state(parts)
            self._stacks[key] = {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}

        def run(tensors: dict[str, Tensor], row: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(parts[0], tensors, (row,))
            return output

        batched: Tensor = torch.vmap(run, randomness="different")(self._stacks[key], x[list(group)])
        return batched.unbind()


class _UpTo(nn.Module):
    """A model that ends at a layer."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return features(self.model, self.layer, x)


@contextmanager
def replaced_output(model: nn.Module, layer: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within a `with` block, what the submodule `layer` computes goes through `replace`."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return replace(output)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
