"""Members of one architecture on shared storage, run as one vmapped module.

All parameters and buffers of a group of G members lie in stacked tensors (G, ...), and the members' own are views into
them. So an optimizer that updates a member's parameters in place updates the stack, and no step copies anything.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Outputs = Tensor | Sequence[Any]  # one entry per member: a stacked tensor, or what each returned

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_REMEDY = "use backend='loop', or 'auto', which loops where it must"


def group_members(members: Sequence[nn.Module]) -> list[list[int]]:
    """Indices of members that can share one vmapped execution, grouped; every member is in exactly one group."""
    groups: list[list[int]] = []
    for index, member in enumerate(members):
        for group in groups:
            others = [members[i] for i in group]
            if _same_architecture(others[0], member) and not any(_share_tensors(other, member) for other in others):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _vmap_pays(x: Tensor) -> bool:
    """Where batching is expected to be faster.

    On a GPU launches bound networks of this size, and vmap makes M times fewer. On a CPU there is nothing to save, and
    the grouped convolutions that vmap makes are no faster than the members' own.
    """
    return x.device.type != "cpu"


def _same_architecture(a: nn.Module, b: nn.Module) -> bool:
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    return (
        list(modules_a) == list(modules_b)
        and all(_same_configuration(modules_a[name], modules_b[name]) for name in modules_a)
        and _layout(a) == _layout(b)
    )


def _same_configuration(a: nn.Module, b: nn.Module) -> bool:
    """Same class and, beside tensors and submodules, the same attributes."""
    extra_a = {name: value for name, value in vars(a).items() if name not in _MODULE_ATTRIBUTES}
    extra_b = {name: value for name, value in vars(b).items() if name not in _MODULE_ATTRIBUTES}
    return (
        type(a) is type(b) and extra_a.keys() == extra_b.keys() and all(map(_equal, extra_a.values(), extra_b.values()))
    )


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, TypeError, ValueError):  # arrays and foreign objects: what has no == counts as different
        return False


def _layout(module: nn.Module) -> list[tuple[Any, ...]]:
    """Every tensor's name, kind and format; a tensor with two names comes once, so differently tied members differ."""
    parameters = [("parameter", name, t.shape, t.dtype, t.device) for name, t in module.named_parameters()]
    return parameters + [("buffer", name, t.shape, t.dtype, t.device) for name, t in module.named_buffers()]


def _share_tensors(a: nn.Module, b: nn.Module) -> bool:
    tensors = {id(t) for t in (*a.parameters(), *a.buffers())}
    return any(id(t) in tensors for t in (*b.parameters(), *b.buffers()))


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


class MemberGroup:
    """Members of one architecture; `indices` are their places in the ensemble.

    The storage is shared from the first batched run on: where only loops run, no parameter is moved.
    """

    def __init__(self, indices: Sequence[int], members: Sequence[nn.Module]) -> None:
        self.indices = tuple(indices)
        self.members = tuple(members)
        self.refusal: str | None = None  # why vmap cannot run these members, once that is known
        self._proved_modes: set[bool] = set()
        self._modules = [list(member.modules()) for member in members]
        self._children = self._current_children()
        self._tensors = self._current_tensors()
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._tied = False

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

    def run(self, x: Tensor, per_member: bool, must_batch: bool) -> Outputs:
        """Outputs of the members, in order; x is (B, ...), or (G, B, ...) with `per_member`.

        `must_batch` raises where vmap cannot run the members; otherwise it is used where it can and pays.
        """
        if len(self.members) == 1 or not self._tensors or not (must_batch or _vmap_pays(x)):
            return self._run_loop(x, per_member)
        obstacle = self._obstacle()
        if obstacle is not None:
            if must_batch:
                raise RuntimeError(f"backend='vmap' cannot run {self._describe()}: {obstacle}; {_REMEDY}")
            return self._run_loop(x, per_member)
        training = any(module.training for module in self._modules[0])
        if training in self._proved_modes:
            return self._run_vmap(x, per_member)
        output = self._try_vmap(x, per_member, must_batch)
        self._proved_modes.add(training)
        return output

    def _try_vmap(self, x: Tensor, per_member: bool, must_batch: bool) -> Outputs:
        """First run in a mode: a module that vmap cannot run leaves its buffers as they were."""
        self._tie()
        before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        try:
            return self._run_vmap(x, per_member)
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
            if any(getattr(module, hooks) for hooks in _HOOKS):
                return f"a hook on a {type(module).__name__} has to run once per member"
        return None

    def _run_loop(self, x: Tensor, per_member: bool) -> Sequence[Any]:
        inputs = x.unbind(0) if per_member else [x] * len(self.members)
        return [member(row) for member, row in zip(self.members, inputs, strict=True)]

    def _run_vmap(self, x: Tensor, per_member: bool) -> Tensor:
        """-> (G, B, K). Buffers (running statistics) are updated in place, as in a loop."""
        self._tie()
        template = self.members[0]
        parameters = dict(zip(self._parameter_names, self._stacked_parameters(), strict=True))
        reassigned: list[str] = []

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
            tensors = {**parameters, **buffers}
            output = functional_call(template, tensors, (x,))
            # A buffer that the module assigned anew, instead of updating it in place, comes back in `tensors`.
            reassigned[:] = [name for name, buffer in buffers.items() if tensors[name] is not buffer]
            return output, [tensors[name] for name in reassigned]

        vmapped: Callable[..., Any] = torch.vmap(call, (0, 0, 0 if per_member else None), randomness="different")
        output: Tensor
        output, values = vmapped(parameters, self._buffers, x)
        for name, value in zip(reassigned, values, strict=True):
            self._buffers[name].copy_(value.detach())
        return output

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
        self._stacks = [_tie_tensors([member[name] for member in parameters]) for name in parameters[0]]
        self._buffers = {name: _tie_tensors([member[name] for member in buffers]) for name in buffers[0]}
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


def _tie_tensors(tensors: Sequence[Tensor]) -> Tensor:
    stack = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, view in zip(tensors, stack, strict=True):
        tensor.data = view
    return stack
