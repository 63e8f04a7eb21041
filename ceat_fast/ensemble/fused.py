"""Frozen members of one architecture as one network, each of whose layers is one launch for all members.

The members lie along the batch: (M * B, C, H, W), channels last. What treats samples alike (pooling, additions) runs on
it as it is. A 3x3 or 1x1 convolution becomes one of all members, which takes the addition and the ReLU behind it along;
any other module with tensors of its own is vmapped over the members. torch.fx finds them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, stack_module_state
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from ceat_fast.ops import convolution, triton_backend

_RELUS = {"call_function": (F.relu, torch.relu, torch.relu_), "call_method": ("relu", "relu_")}
_ADDITIONS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
# How far fused and separate outputs may lie apart, relative to the largest: roundings, and those of TF32 for fp32.
_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 0.01}


Kinds = Mapping[fx.Node, type[nn.Module]]  # of the nodes that call a module


class NotFusableError(Exception):
    """The members have to run another way; the message says why."""


class FusedMembers:
    """Members of one architecture, in eval mode, as one network.

    Their convolutions' weights and biases become views into storage of all members, in which the kernels read them: who
    changes them in place changes the fused network.

    Args:
        members: at least one module.
        sample: an input (1, C, H, W) of one of them.

    Raises:
        NotFusableError: there is no Triton for this device; torch.fx cannot follow the forward; it uses tensors of the
            root module itself, or a module with tensors twice.
    """

    def __init__(self, members: Sequence[nn.Module], sample: Tensor) -> None:
        reason = triton_backend.missing(sample.device.type)
        if reason is not None:
            raise NotFusableError(reason)
        self.members = list(members)
        self._proved = False
        try:
            graph = _Tracer().trace(members[0])
        except Exception as error:  # whatever a forward does with the tracer's proxies
            raise NotFusableError(f"torch.fx cannot trace the forward ({type(error).__name__})") from error
        own = next((node.target for node in graph.nodes if node.op == "get_attr"), None)
        if own is not None:
            raise NotFusableError(f"the forward uses a tensor of the module itself, {own}")
        self._network = _fuse(_with_shapes(graph, members[0], sample), self.members)

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs of the members, (M * B, C, H, W), member by member -> logits (M * B, K).

        Raises:
            NotFusableError: at the first call: the outputs are not those of the members, whose forward mixes samples.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        if not self._proved and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._prove(x.detach())
            self._proved = True
        logits: Tensor = self._network(x)
        return logits

    @torch.no_grad()
    def _prove(self, x: Tensor) -> None:
        right = torch.cat([member(part) for member, part in zip(self.members, x.chunk(len(self.members)), strict=True)])
        fused = self._network(x)
        # Not a comparison the other way round: NaN in both is none of this check's business.
        if fused.shape != right.shape or (fused - right).abs().max() > _TOLERANCE[x.dtype] * right.abs().max():
            raise NotFusableError("the forward does not treat every sample by itself")


class MemberConvolution(nn.Module):
    """A convolution of every member, then perhaps the addition of a residual and a ReLU: (M * B, C, H, W) -> alike.

    A 1x1 convolution is a 3x3 one whose outer taps are 0; channels are filled up with zeros to a width of the kernel.
    """

    def __init__(self, layers: Sequence[nn.Conv2d], relu: bool) -> None:
        super().__init__()
        first = layers[0]
        self.members, self.stride, self.relu = len(layers), first.stride[0], relu
        self.missing = _width(first.in_channels) - first.in_channels
        size = self.members, first.out_channels, 3, 3, _width(first.in_channels)
        weights = first.weight.new_zeros(size)
        self.bias = first.weight.new_zeros(size[:2])
        middle = slice(None) if first.kernel_size == (3, 3) else slice(1, 2)
        for layer, weight, bias in zip(layers, weights, self.bias, strict=True):
            own = weight[:, middle, middle, : first.in_channels].permute(0, 3, 1, 2)
            layer.weight.data = own.copy_(layer.weight)
            if layer.bias is not None:
                layer.bias.data = bias.copy_(layer.bias)
        self.taps = weights.flatten(2, 3).permute(0, 2, 3, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = self._rows(F.pad(x, (0, 0, 0, 0, 0, self.missing)) if self.missing else x)
        skip = None if residual is None else self._rows(residual)
        out = convolution.member_convolution(rows, self.taps, self.bias, skip, stride=self.stride, relu=self.relu)
        return out.flatten(0, 1).permute(0, 3, 1, 2)

    def _rows(self, x: Tensor) -> Tensor:
        """(M * B, C, H, W) -> (M, B, H, W, C), contiguous."""
        return _by_member(x.permute(0, 2, 3, 1), self.members).contiguous()


class MemberModule(nn.Module):
    """A module of every member, vmapped: (M * B, ...) -> (M * B, ...)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(modules)
        self._first = [modules[0]]  # in a list: not a submodule, whose tensors belong to the member
        parameters, buffers = stack_module_state(list(modules))
        self._stacks = {**{name: stack.detach() for name, stack in parameters.items()}, **buffers}
        named = [dict(module.named_parameters()) | dict(module.named_buffers()) for module in modules]
        for name, stack in self._stacks.items():
            for tensors, row in zip(named, stack, strict=True):
                tensors[name].data = row

    def forward(self, *inputs: Tensor) -> Tensor:
        def call(tensors: dict[str, Tensor], *own: Tensor) -> Any:
            return functional_call(self._first[0], tensors, own)

        parts = [_by_member(x, self.count) for x in inputs]
        output: Tensor = torch.vmap(call)(self._stacks, *parts)
        return output.flatten(0, 1)


def _by_member(x: Tensor, members: int) -> Tensor:
    """(M * B, ...) -> (M, B, ...)"""
    return x.view(members, x.shape[0] // members, *x.shape[1:])


class _Tracer(fx.Tracer):
    """Does not look into modules that have tensors of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return bool(m._parameters or m._buffers) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def _with_shapes(graph: fx.Graph, module: nn.Module, sample: Tensor) -> fx.Graph:
    """The graph, of no module, with the shapes that the sample has on its way."""
    ShapeProp(fx.GraphModule(module, graph)).propagate(sample)
    free = fx.Graph()
    free.output(free.graph_copy(graph, {}))
    return free


def _fuse(graph: fx.Graph, members: Sequence[nn.Module]) -> fx.GraphModule:
    modules: dict[str, Any] = {}
    gone: set[fx.Node] = set()
    wrapped: set[str] = set()
    kinds = {node: type(members[0].get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"}
    for node in kinds:
        if node in gone:
            continue
        layers = [member.get_submodule(str(node.target)) for member in members]
        name, chain, arguments = f"layer_{len(modules)}", [node], node.args
        if not any(True for _ in (*layers[0].parameters(), *layers[0].buffers())):
            modules[name] = layers[0]
            node.target = name
            continue
        if str(node.target) in wrapped:
            raise NotFusableError(f"{node.target} is called twice")
        if node.kwargs or not all(isinstance(argument, fx.Node) for argument in arguments):
            raise NotFusableError(f"{node.target} is called with more than tensors")
        wrapped.add(str(node.target))
        convolutions = [layer for layer in layers if _suits(layer)]
        if convolutions:
            chain, residual, relu = _with_epilogue(node, kinds)
            modules[name] = MemberConvolution(convolutions, relu)
            arguments = arguments if residual is None else (*arguments, residual)
        else:
            modules[name] = MemberModule(layers)
        _replace(graph, chain, name, arguments)
        gone.update(chain)
    return fx.GraphModule(modules, graph)


def _suits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0)))
        and layer.stride in ((1, 1), (2, 2))
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and layer.in_channels <= max(convolution.WIDTHS)
        and layer.out_channels in convolution.WIDTHS
    )


def _width(channels: int) -> int:
    return next(width for width in convolution.WIDTHS if width >= channels)


def _with_epilogue(node: fx.Node, kinds: Kinds) -> tuple[list[fx.Node], fx.Node | None, bool]:
    """A convolution and the nodes behind it that its kernel can do; what is added; whether there is a ReLU."""
    chain, residual, relu = [node], None, False
    while (user := _only_user(chain[-1])) is not None and kinds.get(user) is nn.Identity:
        chain.append(user)
    if user is not None and _calls(user, _ADDITIONS) and len(user.args) == 2 and not user.kwargs:
        other = user.args[1] if user.args[0] is chain[-1] else user.args[0]
        if isinstance(other, fx.Node) and other is not chain[-1] and _shape(other) == _shape(node):
            residual = other
            chain.append(user)
            user = _only_user(user)
    if user is not None and (kinds.get(user) is nn.ReLU or _calls(user, _RELUS)):
        relu = True
        chain.append(user)
    return chain, residual, relu


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(node: fx.Node, targets: Mapping[str, tuple[Any, ...]]) -> bool:
    return node.target in targets.get(node.op, ())


def _shape(node: fx.Node) -> Any:
    meta = node.meta.get("tensor_meta")
    return None if meta is None else meta.shape


def _replace(graph: fx.Graph, chain: Sequence[fx.Node], name: str, arguments: tuple[Any, ...]) -> None:
    """A call of the module of that name in place of the nodes, each the only user of the one before."""
    last = chain[-1]
    with graph.inserting_after(last):
        call = graph.call_module(name, arguments)
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(chain):
        graph.erase_node(node)
