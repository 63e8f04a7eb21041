"""Members in train mode as one network, each of whose layers is a few launches for all members: forward and gradients.

The members lie along the batch, (M * B, C, H, W), channels last, in bf16 as under autocast; parameters, statistics of
BatchNorm and gradients of parameters are fp32. Convolutions are those of `fused`; BatchNorm takes the addition and the
ReLU behind it along. Autograd ties the layers together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from ceat_fast.ensemble.architecture import has_hooks
from ceat_fast.ensemble.group import tied
from ceat_fast.ensemble.layouts import Rearrangement
from ceat_fast.ensemble.member_layers import named_tensors, vmapped
from ceat_fast.ensemble.proof import is_as_close
from ceat_fast.ensemble.traced import (
    NotFusableError,
    Operation,
    Values,
    function_of,
    has_kernel,
    has_tensors,
    images,
    rows_of,
    trace,
    with_epilogue,
)
from ceat_fast.ops import convolution, member_training, triton_backend
from ceat_fast.ops.chain import Chain, Link, can_be_link
from ceat_fast.ops.convolution import MemberWeights
from ceat_fast.ops.member_training import Norm

_SAMPLES = 2  # to trace with: BatchNorm in train mode wants more than one
# How far outputs, statistics and gradients may lie from those in fp32: see `is_as_close`.
_SLACK = {"outputs": 0.05, "running statistics": 0.02, "gradients": 0.05}


class FusedTraining:
    """Members of one architecture, in train mode, as one network.

    Parameters and running statistics of BatchNorm become views into storage of all members.

    Args:
        members: at least one module, on a GPU.
        x: inputs (B, C, H, W) of one of them.
        dtype: of the activations.

    Raises:
        NotFusableError: torch.fx cannot follow the forward, or there is something in it that only the members can do.
    """

    def __init__(self, members: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> None:
        reason = triton_backend.missing("cuda") if x.is_cuda else None
        if reason is not None:
            raise NotFusableError(reason)
        reason = _obstacle(members)
        if reason is not None:
            raise NotFusableError(reason)
        self.members = list(members)
        sample = x[:1].detach().expand(_SAMPLES, *x.shape[1:])
        graph = trace(copy.deepcopy(members[0]), sample)
        self._layers = _Layers(graph, self.members, dtype)
        self._tensors = [tensor for member in members for tensor in (*member.parameters(), *member.buffers())]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._proved = False

    def is_current(self) -> bool:
        """False after what replaced a tensor or its storage (assignments, .to()), or changed a mode, hook or flag."""
        tensors = [tensor for member in self.members for tensor in (*member.parameters(), *member.buffers())]
        if len(tensors) != len(self._tensors) or _obstacle(self.members) is not None:
            return False
        return all(
            tensor is own and tensor.data_ptr() == place
            for tensor, own, place in zip(tensors, self._tensors, self._places, strict=True)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs of the members, (M * B, C, H, W), member by member -> logits (M * B, K).

        Raises:
            NotFusableError: at the first call: outputs, statistics or gradients are not those of the members.
        """
        if not self._proved and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._prove(x)
            self._proved = True
        return self._layers.run(x)

    def _prove(self, x: Tensor) -> None:
        ours, plain, exact = (self._pass(call, x) for call in (self._layers.run, self._plainly, self._exactly))
        if ours["outputs"][0].shape != exact["outputs"][0].shape:
            raise NotFusableError("outputs have another shape than the members'")
        for what, slack in _SLACK.items():
            if not is_as_close(ours[what], plain[what], exact[what], slack):
                raise NotFusableError(f"{what} in train mode are not those of the members")

    def _pass(self, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Sequence[Tensor]]:
        """What a pass gives and leaves; buffers are as before afterwards."""
        parameters = [parameter for member in self.members for parameter in member.parameters()]
        buffers = [buffer for member in self.members for buffer in member.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            # Equal draws: what they decide must not pass for rounding.
            with torch.enable_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(0)
                logits = call(x)
                outer = torch.linspace(-1, 1, logits.numel(), device=x.device).view_as(logits).to(logits.dtype)
                grads = torch.autograd.grad(logits, parameters, outer)
            moved = [buffer.clone() for buffer in buffers if buffer.is_floating_point()]  # counters outweigh all else
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotFusableError(f"the members do not run as they are, or not in fp32: {error}") from error
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
        return {"outputs": [logits.detach()], "running statistics": moved, "gradients": grads}

    def _plainly(self, x: Tensor) -> Tensor:
        return torch.cat([member(part) for member, part in zip(self.members, x.chunk(len(self.members)), strict=True)])

    def _exactly(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._plainly(x)


def _obstacle(members: Sequence[nn.Module]) -> str | None:
    """Why they cannot be trained as one network as they are now, or None."""
    for member in members:
        for name, module in member.named_modules():
            if has_hooks(module):
                return f"{name or type(member).__name__} has hooks"
            if not module.training:
                return f"{name} is in eval mode"
        if not all(parameter.requires_grad for parameter in member.parameters()):
            return "some parameters are not trained"
    return None


class _Layers:
    """The layers in order."""

    def __init__(self, graph: fx.Graph, members: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._input = next(node for node in graph.nodes if node.op == "placeholder")
        (self._output,) = next(node for node in graph.nodes if node.op == "output").args
        self._steps: list[_Convolution | _Norm | Operation] = []
        modules = {node: [m.get_submodule(str(node.target)) for m in members] for node in _module_calls(graph)}
        kinds = {node: type(of[0]) for node, of in modules.items()}
        taken: dict[fx.Node, fx.Node] = {}  # nodes that a BatchNorm takes along, with the last of them
        waiting: dict[fx.Node, _Norm] = {}
        used: set[int] = set()
        for node in graph.nodes:
            if node in waiting:
                self._steps.append(waiting[node])
            if node.op in ("placeholder", "output") or node in taken:
                continue
            own = modules.get(node)
            if own is None or not has_tensors(own[0]):
                self._steps.append(Operation(node, function_of(node) if own is None else own[0]))
                continue
            if id(own[0]) in used or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
                raise NotFusableError(f"{node.target} is called twice, or with more than tensors")
            used.add(id(own[0]))
            if type(own[0]) is nn.BatchNorm2d:
                chain, residual, relu = with_epilogue(node, kinds, taken)
                step = _Norm(chain[-1], node.all_input_nodes[0], residual, relu, TrainedNorm(own))
                taken.update(dict.fromkeys(chain, chain[-1]))
                waiting[chain[-1]] = step
                if chain[-1] is node:
                    self._steps.append(step)
            elif all(has_kernel(layer) for layer in own):
                layer = TrainedConvolution(own, dtype, node.meta["shape"][2:])
                self._steps.append(_Convolution(node, node.all_input_nodes[0], layer))
            else:
                self._steps.append(Operation(node, TrainedModule(own)))
        self._names = taken
        convolutions = [step.layer for step in self._steps if isinstance(step, _Convolution)]
        if not convolutions:
            raise NotFusableError("there is no convolution in it that the kernels take")
        self._layouts = _packed(convolutions, dtype)
        norms = [step.layer for step in self._steps if isinstance(step, _Norm)]
        self._batches = tied([norm.num_batches_tracked for layer in norms for norm in layer.norms]) if norms else None

    def run(self, x: Tensor) -> Tensor:
        """(M * B, C, H, W) -> (M * B, K)"""
        self._layouts.refresh()
        if self._batches is not None:
            self._batches.add_(1)
        values: Values = {self._input: x}
        for step in self._steps:
            if isinstance(step, _Convolution):
                values[step.output] = step.layer(self._value(values, step.x))
            elif isinstance(step, _Norm):
                residual = None if step.residual is None else self._value(values, step.residual)
                values[step.output] = step.layer(self._value(values, step.x), residual, step.relu)
            else:
                given = {node: self._value(values, node) for node in step.inputs}
                values[step.output] = step.run(given)
        logits: Tensor = self._value(values, self._output)
        return logits

    def _value(self, values: Values, node: Any) -> Any:
        return values[self._names.get(node, node)]


@dataclass(frozen=True)
class _Convolution:
    output: fx.Node
    x: fx.Node
    layer: TrainedConvolution


@dataclass(frozen=True)
class _Norm:
    """A BatchNorm, perhaps with an addition and a ReLU."""

    output: fx.Node
    x: fx.Node
    residual: fx.Node | None
    relu: bool
    layer: TrainedNorm


class TrainedConvolution:
    """A convolution of every member: (M * B, C, H, W) -> (M * B, F, H', W').

    Attributes:
        chain: the convolution as a chain of one link, which is faster than by itself, for images of the size `side`;
            None where there is no such chain.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, side: Sequence[int]) -> None:
        self.layers, self.members = layers, len(layers)
        if any(layer.bias is not None for layer in layers):
            raise NotFusableError("a convolution has a bias of its own")
        first = layers[0]
        self.channels, self.stride, self.point = first.in_channels, first.stride[0], first.kernel_size == (1, 1)
        padded = convolution.padded_channels(first.in_channels, "cuda")
        assert padded is not None
        self.padded_channels = padded
        storage = self.storage([layer.weight.detach().to(dtype) for layer in layers])
        bias = storage.new_zeros(self.members, first.out_channels)
        self.weights = MemberWeights(storage, bias, self.stride, self.point, kernel=self._kernel(storage))
        self.side = tuple(side)
        is_link = can_be_link(self.weights, *self.side)
        self.chain = Chain([Link(self.weights, residual=False, relu=False)]) if is_link else None

    def _kernel(self, storage: Tensor) -> str | None:
        return None if storage.is_cuda else "triton"

    def storage(self, weights: Sequence[Tensor]) -> Tensor:
        """Weights (M, F, 3, 3, C) of all members."""
        filters = self.layers[0].out_channels
        storage = weights[0].new_zeros(self.members, filters, 3, 3, self.padded_channels)
        middle = slice(1, 2) if self.point else slice(None)
        for place, weight in zip(storage, weights, strict=True):
            place[:, middle, middle, : self.channels].permute(0, 3, 1, 2).copy_(weight)
        return storage

    def __call__(self, x: Tensor) -> Tensor:
        rows: Tensor = rows_of(x.to(self.weights.bias.dtype), self.members)
        rows = _Convolve.apply(rows, self, *(layer.weight for layer in self.layers))
        return images(rows)


class TrainedNorm:
    """A BatchNorm of every member, whose tensors become views into storage of all."""

    def __init__(self, norms: Sequence[Any]) -> None:
        first = norms[0]
        if not first.track_running_stats or not first.affine or first.momentum is None:
            raise NotFusableError("a BatchNorm is without statistics, parameters or momentum")
        if convolution.padded_channels(first.num_features, "cuda") != first.num_features:
            raise NotFusableError(f"a BatchNorm has {first.num_features} channels")
        self.norms, self.members = norms, len(norms)
        weight, bias, mean, var = (
            tied([getattr(norm, name) for norm in norms]) for name in ("weight", "bias", "running_mean", "running_var")
        )
        self.norm = Norm(weight, bias, mean, var, first.momentum, first.eps)

    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        skip = None if residual is None else rows_of(residual.to(x.dtype), self.members)
        parameters = *(norm.weight for norm in self.norms), *(norm.bias for norm in self.norms)
        rows: Tensor = _Normalise.apply(rows_of(x, self.members), skip, self.norm, relu, *parameters)
        return images(rows)


class TrainedModule:
    """Any other module of every member, in one call: (M * B, ...) -> (M * B, ...)."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, *inputs: Tensor) -> Tensor:
        named = [named_tensors(module) for module in self.modules]
        stacks = {name: torch.stack([tensors[name] for tensors in named]) for name in named[0]}

        return vmapped(self.modules, stacks, inputs)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TrainedConvolution, *weights: Tensor) -> Tensor:
        missing = layer.padded_channels - x.shape[-1]
        x = torch.nn.functional.pad(x, (0, missing)) if missing else x
        ctx.layer, ctx.chain = layer, layer.chain if x.shape[2:4] == layer.side else None
        if ctx.chain is None:
            ctx.save_for_backward(x)
            return layer.weights.convolve(x, relu=False)
        out: Tensor
        out, masks = ctx.chain.run(x, None, masked=True)
        ctx.save_for_backward(x, masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, *masks), layer = ctx.saved_tensors, ctx.layer
        grad = grad.contiguous()
        inner = None
        if ctx.needs_input_grad[0] and ctx.chain is not None:
            inner = ctx.chain.input_gradient(grad, *masks)[0][..., : layer.channels]
        elif ctx.needs_input_grad[0]:
            inner = layer.weights.input_gradient(grad, *x.shape[2:4])[..., : layer.channels]
        weights = member_training.weight_gradient(x, grad, layer.stride, point=layer.point, channels=layer.channels)
        return inner, None, *weights


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, norm: Norm, relu: bool, *parameters: Tensor) -> Tensor:
        out, saved = member_training.normalise(x, norm, residual, relu=relu)
        ctx.weight, ctx.relu, ctx.has_residual = norm.weight, relu, residual is not None
        ctx.save_for_backward(x, out, saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, out, saved = ctx.saved_tensors
        found = member_training.norm_gradients(
            grad.contiguous(), out, x, saved, ctx.weight, residual=ctx.has_residual, relu=ctx.relu
        )
        return found.x, found.residual, None, None, *found.weight, *found.bias


def _packed(layers: Sequence[TrainedConvolution], dtype: torch.dtype) -> Rearrangement:
    """The layouts of all layers' weights, from the members' own in fp32."""

    def arrange(tensors: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(tensors)
        results: list[Tensor] = []
        for layer in layers:
            storage = layer.storage([next(rest) for _ in layer.layers])
            stored = storage, storage.new_zeros(storage.shape[:2])
            results += layer.weights.layouts(*stored)
            results += layer.chain.layouts([stored]) if layer.chain is not None else []
        return results

    sources = [own.weight for layer in layers for own in layer.layers]
    copies = Rearrangement(sources, arrange, dtype)
    rest = iter(copies.results)
    for layer in layers:
        layer.weights.read_from(*(next(rest) for _ in range(4 if layer.weights.kernel == "cuda" else 2)))
        if layer.chain is not None:
            layer.chain.read_from(*(next(rest) for _ in range(3)))
    return copies


def _module_calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module"]
