"""What a module's forward computes, as torch.fx finds it, and the parts that networks of all members are built from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ceat_fast.ensemble.tracer import Tracer
from ceat_fast.ops import convolution

_RELUS = {"call_function": (F.relu, torch.relu, torch.relu_), "call_method": ("relu", "relu_")}
_ADDITIONS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
_TRACES = 3

Kinds = Mapping[fx.Node, type[nn.Module]]  # of the nodes that call a module
Values = dict[fx.Node, Any]


class NotFusableError(Exception):
    """The members have to run another way; the message says why."""


@dataclass(frozen=True)
class Operation:
    """Anything else: what the node calls, on the values of the nodes among its arguments."""

    output: fx.Node
    call: Callable[..., Any]

    @property
    def inputs(self) -> list[fx.Node]:
        return list(self.output.all_input_nodes)

    def run(self, values: Values) -> Any:
        given = {node: values[node] for node in self.inputs}
        if self._may_write:
            given = {node: value.clone() if isinstance(value, Tensor) else value for node, value in given.items()}
        args, kwargs = fx.node.map_arg((self.output.args, self.output.kwargs), given.__getitem__)
        return self.call(*args, **kwargs)

    @property
    def _may_write(self) -> bool:
        """Whether it may work in place: others need its inputs as they were."""
        target, kwargs = self.output.target, self.output.kwargs
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        in_place = name.endswith("_") or (name.startswith("i") and hasattr(operator, name))
        return bool(in_place or kwargs.get("inplace") or getattr(self.call, "inplace", False))


def trace(module: nn.Module, sample: Tensor) -> fx.Graph:
    """What the forward computes, with the shapes for that sample.

    Numbers that it draws in Python would be constants in the graph: several traces have to agree.
    """
    try:
        graph, *others = (_Tracer().trace(module) for _ in range(_TRACES))
    except Exception as error:  # whatever a forward does with the tracer's proxies
        raise NotFusableError(f"torch.fx cannot trace the forward ({type(error).__name__})") from error
    if any(str(other) != str(graph) for other in others):
        raise NotFusableError("the forward is another one every time")
    if not isinstance(next(node for node in graph.nodes if node.op == "output").args[0], fx.Node):
        raise NotFusableError("the forward does not return logits (B, K)")
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise NotFusableError("the forward takes more than the images")
    own = next((node.target for node in graph.nodes if node.op == "get_attr"), None)
    if own is not None:
        raise NotFusableError(f"the forward uses a tensor of the module itself, {own}")
    _without_identities(graph, module)
    with torch.no_grad():
        module(sample)  # an input that is wrong for it says so here, in its own words
        _Shapes(fx.GraphModule(module, graph)).run(sample)
    return graph


class _Tracer(Tracer):
    """Does not look into modules that have tensors of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return bool(m._parameters or m._buffers) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Notes the shapes of values."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = value.shape if isinstance(value, Tensor) else None
        return value


def _without_identities(graph: fx.Graph, module: nn.Module) -> None:
    """Drop the calls of what folding put in the place of BatchNorm."""
    for node in list(graph.nodes):
        is_module = node.op == "call_module" and type(module.get_submodule(str(node.target))) is nn.Identity
        if is_module and len(node.all_input_nodes) == 1:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def function_of(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_function":
        assert callable(node.target)
        return node.target
    of_another_type = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    # Images in channels_last have no view as rows.
    return _as_shape if node.target == "view" and not of_another_type else _Method(str(node.target))


def _as_shape(x: Tensor, *sizes: Any, size: Any = None) -> Tensor:
    return x.reshape(*sizes) if size is None else x.reshape(size)


@dataclass(frozen=True)
class _Method:
    """Calls the method of that name of its first argument."""

    name: str

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(first, self.name)(*args, **kwargs)


def has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def has_kernel(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that a kernel for all members takes."""
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0)))
        and layer.stride in ((1, 1), (2, 2))
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and convolution.missing(layer.weight.device.type, layer.weight.dtype) is None
        and convolution.padded_channels(layer.in_channels, layer.weight.device.type) is not None
        and convolution.padded_channels(layer.out_channels, layer.weight.device.type) == layer.out_channels
    )


def with_epilogue(
    node: fx.Node, kinds: Kinds, taken: Collection[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None, bool]:
    """A convolution and the nodes behind it that its kernel can do; what is added; whether there is a ReLU.

    An addition of two convolutions belongs to the first: it is `taken` when the second comes.
    """
    chain, residual, relu = [node], None, False
    user = _only_user(node)
    if user is not None and user not in taken and _calls(user, _ADDITIONS) and len(user.args) == 2 and not user.kwargs:
        other = user.args[1] if user.args[0] is chain[-1] else user.args[0]
        if isinstance(other, fx.Node) and other is not chain[-1] and _shape(other) == _shape(node):
            residual = other
            chain.append(user)
            user = _only_user(user)
    if user is not None and user not in taken and (kinds.get(user) is nn.ReLU or _calls(user, _RELUS)):
        relu = True
        chain.append(user)
    return chain, residual, relu


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(node: fx.Node, targets: Mapping[str, tuple[Any, ...]]) -> bool:
    return node.target in targets.get(node.op, ())


def _shape(node: fx.Node) -> Any:
    return node.meta.get("shape")


def by_member(x: Tensor, members: int) -> Tensor:
    """(M * B, ...) -> (M, B, ...)"""
    return x.view(members, x.shape[0] // members, *x.shape[1:])


def images(rows: Tensor) -> Tensor:
    """(M, B, H, W, C) -> (M * B, C, H, W), a view."""
    view = rows.flatten(0, 1).permute(0, 3, 1, 2)
    setattr(view, _ROWS, rows)
    return view


def rows_of(x: Tensor, members: int) -> Tensor:
    """(M * B, C, H, W) -> (M, B, H, W, C), contiguous."""
    rows: Tensor | None = getattr(x, _ROWS, None)
    if rows is not None and rows.shape[0] == members:
        return rows
    return by_member(x.permute(0, 2, 3, 1), members).contiguous()


# Images remember the rows that they are a view of: finding them again takes as long as a small convolution.
_ROWS = "_ceat_fast_rows"
