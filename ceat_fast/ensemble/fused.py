"""Frozen members of one architecture as one network, each of whose layers is one launch for all members.

The members lie along the batch: (M * B, C, H, W), channels last. What treats samples alike (pooling, additions) runs on
it as it is. A 3x3 or 1x1 convolution becomes one of all members, which takes the addition and the ReLU behind it along,
and convolutions behind each other become one launch where they can (`chains`);
any other module with tensors of its own is vmapped over the members on a GPU, and called for one after the other on a
CPU. torch.fx finds them.

The gradient for the input goes the same way back: one launch for each convolution, which adds what the convolution's
input has of gradient from elsewhere, and applies the ReLU that the input came out of. Other operations are autograd's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ceat_fast.ensemble.chains import MemberChain, with_chains
from ceat_fast.ensemble.layouts import Layouts
from ceat_fast.ensemble.member_layers import Convolution, MemberConvolution, MemberModule, VmappedModule
from ceat_fast.ensemble.proof import is_as_close
from ceat_fast.ensemble.traced import (
    NotFusableError,
    Operation,
    Values,
    function_of,
    has_kernel,
    has_tensors,
    trace,
    with_epilogue,
)
from ceat_fast.ops import convolution
from ceat_fast.ops.buffers import Buffers

_PROVED = 4  # samples of each member
# How far outputs may lie from those in fp32 (see `is_as_close`): by roundings, on a GPU those of TF32.
_OUTPUT_SLACK = {"cpu": 1e-3, "cuda": 0.02}
_LOW_PRECISION_SLACK = 0.03
_GRADIENT_SLACK = 0.3  # far above roundings, and below what another gradient would show


class FusedMembers:
    """Members of one architecture, in eval mode, as one network.

    Their tensors become views into storage of all members. Who changes them in place calls `refresh`.

    Args:
        members: at least one module.
        sample: an input (1, C, H, W) of one of them.

    Raises:
        NotFusableError: there are no kernels for this device; torch.fx cannot follow the forward; it uses tensors of
            the root module itself, a module with tensors twice, or a tensor in two modules.
    """

    def __init__(self, members: Sequence[nn.Module], sample: Tensor) -> None:
        reason = convolution.missing(sample.device.type, sample.dtype)
        if reason is not None:
            raise NotFusableError(reason)
        self.members = list(members)
        self._dtype = sample.dtype
        self._proved = False
        graph = trace(members[0], sample)
        self.program = _Program(graph, self.members)
        self._buffers = Buffers()
        for step in self.program.steps:
            if isinstance(step, Convolution):
                step.layer.weights.buffers = self._buffers

    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        self._buffers.open()
        self.program.refresh()

    def release(self) -> None:
        """Drop what was made from weights on a CPU, and memory that is kept, until `refresh`."""
        self._buffers.close()
        for step in self.program.steps:
            if isinstance(step, Convolution):
                step.layer.weights.release()

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs of the members, (M * B, C, H, W), member by member -> logits (M * B, K).

        Raises:
            NotFusableError: at the first call: the outputs are not those of the members, whose forward mixes samples.
        """
        if x.dtype != self._dtype:
            return self.plainly(x)  # torch says what does not go together
        if not self._proved and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._prove(x.detach())
            self._proved = True
        plain = torch.autograd.forward_ad._current_level < 0  # no derivative in forward mode
        if plain and not (x.requires_grad and torch.is_grad_enabled()):
            return self.program.run(x)
        logits: Tensor = _Fused.apply(x, self)
        return logits

    def plainly(self, x: Tensor) -> Tensor:
        """The same by the members themselves."""
        return _run_each(self.members, x)

    def _prove(self, x: Tensor) -> None:
        # Members that see the same would not show that samples of one reach another.
        parts = [part[:_PROVED] for part in x.chunk(len(self.members))]
        rows = torch.cat([part * (1 - 0.1 * m) for m, part in enumerate(parts)])
        ours, plain = _with_gradient(lambda x: _Fused.apply(x, self), rows), _with_gradient(self.plainly, rows)
        exact, slack = plain, _OUTPUT_SLACK[x.device.type]
        if x.dtype in (torch.bfloat16, torch.float16):
            exact, slack = self._exactly(rows), _LOW_PRECISION_SLACK
        if ours[0].shape != exact[0].shape or not is_as_close(ours[:1], plain[:1], exact[:1], slack):
            raise NotFusableError("the forward does not treat every sample by itself")
        same_kind = len(ours) == len(plain) == len(exact)
        if not same_kind or not is_as_close(ours[1:], plain[1:], exact[1:], _GRADIENT_SLACK):
            raise NotFusableError("the forward has a gradient of its own making")

    def _exactly(self, x: Tensor) -> list[Tensor]:
        """Outputs and gradient of the members in fp32."""
        members = [copy.deepcopy(member).float() for member in self.members]
        try:
            return _with_gradient(lambda x: _run_each(members, x), x.float())
        except RuntimeError as error:
            raise NotFusableError(f"the members do not run in fp32, to compare with: {error}") from error


def _run_each(members: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Each member on its part of the batch."""
    parts = x.chunk(len(members))
    try:
        outputs = [member(part) for member, part in zip(members, parts, strict=True)]
    except RuntimeError:
        # Their weights lie in channels_last here, which a forward with `view` cannot do with.
        copies = [copy.deepcopy(member).to(memory_format=torch.contiguous_format) for member in members]
        outputs = [member(part.contiguous()) for member, part in zip(copies, parts, strict=True)]
    if any(not isinstance(output, Tensor) or output.dim() != 2 for output in outputs):
        raise NotFusableError("the forward does not return logits (B, K)")
    return torch.cat(outputs)


def _with_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The outputs and, if they have one, a gradient of theirs for the input."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = call(x)
        if not output.requires_grad:
            return [output]
        outer = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
        (grad,) = torch.autograd.grad(output, x, outer, allow_unused=True)
    return [output.detach()] if grad is None else [output.detach(), grad]


_Step = Convolution | Operation | MemberChain


def _uses(output: fx.Node, steps: Sequence[_Step]) -> Counter[fx.Node]:
    """How often each value is asked for."""
    return Counter([output, *(node for step in steps for node in step.inputs)])


class _Program:
    """The steps of the network in order."""

    def __init__(self, graph: fx.Graph, members: Sequence[nn.Module]) -> None:
        self.steps, names = _steps(graph, members)
        self._input = next(node for node in graph.nodes if node.op == "placeholder")
        (returned,) = next(node for node in graph.nodes if node.op == "output").args
        assert isinstance(returned, fx.Node)
        self._output = names.get(returned, returned)
        self._uses = _uses(self._output, self.steps)
        self._shape = self._input.meta["shape"][1:]
        self._chained = with_chains(self.steps, self._uses)
        self._chained_uses = _uses(self._output, self._chained)
        untied = [step.layer for step in self.steps if isinstance(step, Convolution) and not step.layer.is_tied]
        chains = [step.chain for step in self._chained if isinstance(step, MemberChain)]
        self._layouts = Layouts(untied, chains) if untied else None

    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        if self._layouts is not None:
            self._layouts.refresh()
        for step in self.steps:
            if isinstance(step, Convolution) and step.layer.is_tied:
                step.layer.weights.refresh()

    def _plan(self, x: Tensor) -> tuple[Sequence[_Step], Counter[fx.Node]]:
        """The steps for such an input, and how often they use each value: chains are made for one size of images."""
        return (self._chained, self._chained_uses) if x.shape[1:] == self._shape else (self.steps, self._uses)

    def run(self, x: Tensor, record: _Record | None = None) -> Tensor:
        """The network's output; `record` keeps what its gradient needs."""
        values: Values = {self._input: x}
        steps, uses = self._plan(x)
        left = Counter(uses)
        for step in steps:
            if isinstance(step, Convolution | MemberChain):
                residual = None if step.residual is None else values[step.residual]
                if isinstance(step, Convolution):
                    values[step.output] = step.layer(values[step.x], residual, step.relu)
                else:
                    values[step.output], masks = step.run(values[step.x], residual, masked=record is not None)
                    if record is not None:
                        record.masks[step.output] = masks
                if record is not None and not record.attached.isdisjoint(step.inputs):
                    record.attached.add(step.output)
            elif record is None:
                values[step.output] = step.run(values)
            else:
                values[step.output] = record.run(step, values)
            for node in step.inputs if record is None else ():
                left[node] -= 1
                if not left[node]:
                    del values[node]
        logits: Tensor = values[self._output]
        if record is not None:
            # What autograd returns refers to its node and so to the record, which must not refer to it.
            record.values = values | {self._output: logits.detach()}
        return logits

    def new_record(self) -> _Record:
        return _Record(self._input)

    def is_differentiable(self, record: _Record) -> bool:
        """Whether the output of that run depends on the input in a way that autograd knows."""
        return self._output in record.attached

    def input_gradient(self, grad: Tensor, record: _Record) -> Tensor:
        """The gradient for the input, of the run that was recorded."""
        steps, uses = self._plan(record.values[self._input])
        grads = _Gradients(uses, record.values, {step.output: step for step in steps})
        grads.add(self._output, grad)
        for step in reversed(steps):
            outer = grads.take(step.output)
            if isinstance(step, Convolution):
                grads.through_convolution(step, outer)
            elif isinstance(step, MemberChain):
                grads.through_chain(step, outer, record.masks[step.output])
            else:
                inner = record.gradients(step, outer) if outer is not None else {}
                for node in step.inputs:
                    grads.add(node, inner.get(node))
        total = grads.take(self._input)
        return torch.zeros_like(record.values[self._input]) if total is None else total


class _Record:
    """What a run keeps for its gradient: all values, and how autograd made those that are no convolution's.

    Attributes:
        attached: the values that depend on the input in a way that autograd knows.
        masks: what chains left, by their outputs.
    """

    def __init__(self, entry: fx.Node) -> None:
        self.values: Values = {}
        self.masks: dict[fx.Node, Tensor] = {}
        self.attached = {entry}
        self._made: dict[fx.Node, tuple[dict[fx.Node, Tensor], Any]] = {}

    def run(self, step: Operation, values: Values) -> Any:
        with torch.enable_grad():
            leaves = {node: values[node].detach().requires_grad_() for node in step.inputs if node in self.attached}
            output = step.run(values | leaves)
        self._made[step.output] = leaves, output
        if not isinstance(output, Tensor):
            return output
        if output.requires_grad:
            self.attached.add(step.output)
        return output.detach()

    def gradients(self, step: Operation, outer: Tensor) -> dict[fx.Node, Tensor | None]:
        leaves, output = self._made[step.output]
        if not leaves or not output.requires_grad:
            return {}
        # The caller may ask again, as with retain_graph=True.
        found = torch.autograd.grad(output, list(leaves.values()), outer, allow_unused=True, retain_graph=True)
        return dict(zip(leaves, found, strict=True))


class _Gradients:
    """Sums of the gradients of all values, added up use by use."""

    def __init__(self, uses: Counter[fx.Node], values: Values, makers: Mapping[fx.Node, Any]) -> None:
        self._left, self._values, self._makers = Counter(uses), values, makers
        self._sums: dict[fx.Node, Tensor] = {}
        self._gated: set[fx.Node] = set()  # those to which the ReLU of their step is applied already

    def add(self, node: fx.Node, grad: Tensor | None) -> None:
        """What one use of a value gives to its gradient."""
        self._left[node] -= 1
        if grad is not None:
            before = self._sums.get(node)
            self._sums[node] = grad if before is None else before + grad

    def take(self, node: fx.Node) -> Tensor | None:
        """The gradient of a value, before the ReLU of its step if it has one."""
        grad = self._sums.pop(node, None)
        if grad is not None and self._has_relu(node) and node not in self._gated:
            # In one memory format it is one sweep; what comes from a pooling layer is in the other.
            grad = grad.contiguous(memory_format=torch.channels_last)
            grad = torch.ops.aten.threshold_backward(grad, self._values[node], 0)
        return grad

    def through_convolution(self, step: Convolution, grad: Tensor | None) -> None:
        """The gradients of a convolution's inputs, from that of its sum."""
        if step.residual is not None:
            self.add(step.residual, grad)
        if grad is None:
            self.add(step.x, None)
            return
        x = self._values[step.x]
        last = self._left[step.x] == 1 and self._has_relu(step.x)
        before = self._sums.pop(step.x, None)
        total = step.layer.input_gradient(grad, x, before, x if last else None)
        if last:
            self._gated.add(step.x)
        self.add(step.x, total)

    def through_chain(self, step: MemberChain, grad: Tensor | None, masks: Tensor) -> None:
        """The gradients of a chain's inputs, from that of its output: its ReLUs are its own."""
        if grad is None:
            for node in step.inputs:
                self.add(node, None)
            return
        alone = self._left[step.x] == 1 and step.x not in self._sums and self._has_relu(step.x)
        total, for_residual = step.input_gradient(grad, masks, self._values[step.x] if alone else None)
        if alone:
            self._gated.add(step.x)
        self.add(step.x, total)
        if step.residual is not None:
            self.add(step.residual, for_residual)

    def _has_relu(self, node: fx.Node) -> bool:
        """Whether a convolution left a ReLU's gradient to others."""
        maker = self._makers.get(node)
        return isinstance(maker, Convolution) and maker.relu


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, members: FusedMembers) -> Tensor:
        program = members.program
        ctx.members, ctx.record = members, program.new_record()
        ctx.save_for_backward(x)
        logits = program.run(x, ctx.record)
        if not program.is_differentiable(ctx.record):
            ctx.mark_non_differentiable(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return ctx.members.program.input_gradient(grad, ctx.record), None
        # Gradients of gradients are torch's.
        (x,) = ctx.saved_tensors
        (again,) = torch.autograd.grad(ctx.members.plainly(x), x, grad, create_graph=True)
        return again, None


def _steps(
    graph: fx.Graph, members: Sequence[nn.Module]
) -> tuple[list[Convolution | Operation], dict[fx.Node, fx.Node]]:
    """The steps in an order in which they can run; for a node that is part of one, the node that names its value."""
    steps: list[Convolution | Operation] = []
    last_of: dict[fx.Node, fx.Node] = {}
    wrapped: set[str] = set()
    tied: set[int] = set()  # tensors that are views into storage of all members by now
    kinds = {node: type(members[0].get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"}
    fused: dict[fx.Node, Convolution] = {}  # by the last node of the chain, where the step has its place
    for node in graph.nodes:
        if node in fused:
            steps.append(fused[node])
        if node.op in ("placeholder", "output") or node in last_of:
            continue
        layers = [member.get_submodule(str(node.target)) for member in members] if node in kinds else []
        if not layers or not has_tensors(layers[0]):
            steps.append(Operation(node, layers[0] if layers else function_of(node)))
            continue
        if str(node.target) in wrapped:
            raise NotFusableError(f"{node.target} is called twice")
        if node.kwargs or not all(isinstance(argument, fx.Node) for argument in node.args):
            raise NotFusableError(f"{node.target} is called with more than tensors")
        wrapped.add(str(node.target))
        own = {id(tensor) for tensor in (*layers[0].parameters(), *layers[0].buffers())}
        if own & tied:
            raise NotFusableError(f"{node.target} shares a tensor with another module")
        tied |= own
        convolutions = [layer for layer in layers if has_kernel(layer)]
        if not convolutions:
            on_cpu = all(tensor.device.type == "cpu" for tensor in (*layers[0].parameters(), *layers[0].buffers()))
            steps.append(Operation(node, MemberModule(layers) if on_cpu else VmappedModule(layers)))
            continue
        chain, residual, relu = with_epilogue(node, kinds, last_of)
        step = Convolution(chain[-1], MemberConvolution(convolutions), node.all_input_nodes[0], residual, relu)
        last_of.update(dict.fromkeys(chain, chain[-1]))
        fused[chain[-1]] = step
        if chain[-1] is node:
            steps.append(step)
    return steps, last_of
