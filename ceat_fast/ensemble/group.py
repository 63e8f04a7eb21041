"""Members of one architecture on shared storage, run as one vmapped module.

All parameters and buffers of a group of G members lie in stacked tensors (G, ...), and the members' own are views into
them. So an optimizer that updates a member's parameters in place updates the stack, and no step copies anything.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ceat_fast.ensemble.architecture import has_hooks

Outputs = Tensor | Sequence[Any]  # one entry per member: a stacked tensor, or what each returned

_REMEDY = "use backend='loop', or 'auto', which loops where it must"


class _Stack(torch.autograd.Function):
    """The stacked storage as a differentiable function of the member parameters that are views into it."""

    @staticmethod
    def forward(stacks: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(stack.detach() for stack in stacks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.parameters = inputs[1:]
        # The stacks do not see in-place updates of their views, so the check that autograd would make is made here.
        ctx.versions = [parameter._version for parameter in ctx.parameters]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError(
                "a member's parameters were modified in place between the batched forward and its backward: run "
                "backward for all members before any optimizer steps, or use Ensemble(..., backend='loop')"
            )
        members = len(ctx.parameters) // len(grads)
        rows = ((None,) * members if grad is None else grad.unbind(0) for grad in grads)
        return None, *(row for stack_rows in rows for row in stack_rows)


def _functional(
    module: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of `module` with these tensors, and the buffers that it assigned anew instead of in place."""
    tensors = {**parameters, **buffers}
    output = functional_call(module, tensors, (x,))
    return output, {name: tensors[name] for name, buffer in buffers.items() if tensors[name] is not buffer}


class MemberGroup:
    """Members of one architecture; `indices` are their places in the ensemble.

    The storage is shared from the first batched run on: where only loops run, no parameter is moved.
    """

    def __init__(self, indices: Sequence[int], members: Sequence[nn.Module]) -> None:
        self.indices = tuple(indices)
        self.members = tuple(members)
        self.refusal: str | None = None  # why vmap cannot run these members, once that is known
        self._proved_modes: set[tuple[bool, bool, bool]] = set()  # (training, compiled, per_member)
        self._modules = [list(member.modules()) for member in members]
        self._children = self._current_children()
        self._tensors = self._current_tensors()
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._tied = False
        self._calls: dict[tuple[bool, bool], Callable[..., Any]] = {}

    def is_current(self) -> bool:
        """False after surgery, .to(), deepcopy or assignment: anything that replaced a submodule, tensor or storage."""
        if self._current_children() != self._children:
            return False
        tensors = self._current_tensors()
        return (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and [tensor.data_ptr() for tensor in tensors] == self._pointers
        )

    def run(self, x: Tensor, per_member: bool, must_batch: bool, compiled: bool = False) -> Outputs:
        """Outputs of the members, in order; x is (B, ...), or (G, B, ...) with `per_member`.

        `must_batch` raises where vmap cannot run the members; otherwise they loop there. `compiled` sends the batched
        run through torch.compile.
        """
        if len(self.members) == 1 or not self._tensors:
            return self._run_loop(x, per_member)
        obstacle = self._obstacle()
        if obstacle is not None:
            if must_batch:
                raise RuntimeError(f"backend='vmap' cannot run {self._describe()}: {obstacle}; {_REMEDY}")
            return self._run_loop(x, per_member)
        training = any(module.training for module in self._modules[0])
        mode = training, compiled, per_member
        if mode in self._proved_modes:
            return self._run_vmap(x, per_member, compiled)
        output = self._try_vmap(x, per_member, must_batch, compiled)
        self._proved_modes.add(mode)
        return output

    def _try_vmap(self, x: Tensor, per_member: bool, must_batch: bool, compiled: bool) -> Outputs:
        """First run in a mode: a module that vmap cannot run leaves its buffers as they were."""
        self._tie()
        before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        try:
            return self._run_vmap(x, per_member, compiled)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            for name, buffer in self._buffers.items():
                buffer.copy_(before[name])
            if must_batch:
                raise RuntimeError(f"backend='vmap' failed on {self._describe()}: {error}; {_REMEDY}") from error
            output = self._run_loop(x, per_member)  # raises by itself where the fault is the input's
            self.refusal = f"vmap failed: {error}"
            return output

    def _describe(self) -> str:
        return f"members {', '.join(map(str, self.indices))} ({type(self.members[0]).__name__})"

    def _obstacle(self) -> str | None:
        """Why the members cannot run as one now, or None."""
        if self.refusal is not None:
            return self.refusal
        modes = [[module.training for module in modules] for modules in self._modules]
        if any(mode != modes[0] for mode in modes[1:]):
            return "their train/eval modes differ"
        for module in itertools.chain.from_iterable(self._modules):
            if has_hooks(module):
                return f"a hook on a {type(module).__name__} has to run once per member"
        return None

    def _run_loop(self, x: Tensor, per_member: bool) -> Sequence[Any]:
        inputs = x.unbind(0) if per_member else [x] * len(self.members)
        return [member(row) for member, row in zip(self.members, inputs, strict=True)]

    def _run_vmap(self, x: Tensor, per_member: bool, compiled: bool) -> Tensor:
        """-> (G, B, K). Buffers (running statistics) are updated in place, as in a loop."""
        self._tie()
        parameters = dict(zip(self._parameter_names, self._stacked_parameters(), strict=True))
        output, reassigned = self._batched_call(per_member, compiled)(parameters, self._buffers, x)
        for name, value in reassigned.items():
            self._buffers[name].copy_(value.detach())
        logits: Tensor = output
        return logits

    def _batched_call(self, per_member: bool, compiled: bool) -> Callable[..., Any]:
        """(stacked parameters, stacked buffers, x) -> (outputs, buffers that were not updated in place)."""
        key = per_member, compiled
        if key not in self._calls:
            call = partial(_functional, self.members[0])
            batched = torch.vmap(call, (0, 0, 0 if per_member else None), randomness="different")
            self._calls[key] = torch.compile(batched) if compiled else batched
        return self._calls[key]

    def _stacked_parameters(self) -> Sequence[Tensor]:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._parameters):
            differentiable: tuple[Tensor, ...] = _Stack.apply(self._stacks, *self._parameters)
            return differentiable
        return self._stacks

    def _tie(self) -> None:
        """Move the members' tensors into stacks, once; `is_current` tells when a new group has to be made."""
        if self._tied:
            return
        parameters = [dict(member.named_parameters()) for member in self.members]
        buffers = [dict(member.named_buffers()) for member in self.members]
        self._parameter_names = list(parameters[0])
        self._parameters = [member[name] for name in parameters[0] for member in parameters]
        self._stacks = [tied([member[name] for member in parameters]) for name in parameters[0]]
        self._buffers = {name: tied([member[name] for member in buffers]) for name in buffers[0]}
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._tied = True

    def _current_children(self) -> list[tuple[nn.Module | None, ...]]:
        return [tuple(module._modules.values()) for modules in self._modules for module in modules]

    def _current_tensors(self) -> list[Tensor]:
        return [
            tensor
            for modules in self._modules
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]


def tied(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in one, whose rows they become views into."""
    with torch.inference_mode(False):  # whose tensors could not be trained afterwards
        stack = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, view in zip(tensors, stack, strict=True):
            tensor.data = view
    return stack
