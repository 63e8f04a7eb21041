"""An ensemble as one module (eq. 1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ceat_fast.choices import require_choice
from ceat_fast.ensemble.architecture import group_members, has_hooks
from ceat_fast.ensemble.convolutions import is_traced, is_transformed, winograd_convolutions
from ceat_fast.ensemble.execution import AUTO, Execution, Tuned, default_execution
from ceat_fast.ensemble.folding import refuse
from ceat_fast.ensemble.fused import FusedMembers
from ceat_fast.ensemble.fused_training import FusedTraining
from ceat_fast.ensemble.graphs import Captures, GraphedCalls
from ceat_fast.ensemble.group import MemberGroup
from ceat_fast.ensemble.memory_format import ChannelsLast, channels_last
from ceat_fast.ensemble.streams import run_in_streams
from ceat_fast.ensemble.traced import NotFusableError
from ceat_fast.ops import reference

AVERAGES = ("prob", "logit")


class Ensemble(nn.Module):
    """M members as one classifier: images (B, ...) -> (B, K) log-probabilities of the ensemble.

    Args:
        members: at least one module, each maps the same inputs to logits (B, K). Kept as `ens.members`; state-dict
            keys are "members.<m>.<the member's own key>".
        backend: "vmap" runs members of equal architecture (same classes, attributes and tensor shapes) as one batched
            module and raises where that is impossible; "loop" runs one after the other; "streams" does on CUDA streams
            side by side; "fused" attacks members of equal architecture as one network with kernels of our own. Options
            follow a plus: "loop+channels_last", "vmap+compile"; `Execution` lists them. "auto" takes the execution that
            `tune` measured to be the fastest, before that a default ("fused" on a CPU where the kernels were built),
            and another way where that one is impossible. Mixed architectures form several groups; a group of one is
            called directly.
        average: "prob" for the mean of the members' probabilities (eq. 1), "logit" for the softmax of the mean logits.

    Members that run batched share storage: their parameters are views into stacked tensors, made on the first batched
    run. They stay ordinary leaf parameters that any optimizer can train in place. Attributes of a member that are no
    tensors or submodules (a stride, a momentum) are compared when groups are made; call `regroup()` after changing one.
    `torch.func` transforms over the parameters replace these by tensors without storage: they need backend="loop".

    Raises:
        TypeError: a member that is no module.
        ValueError: no members, an unknown backend or average, or a member with uninitialised (lazy) parameters.
    """

    # What a copy makes anew.
    runtime_attributes = frozenset(
        {"_groups", "_compiled", "captures", "_graphs", "_fused", "_trained", "_not_fusable", "_format"}
    )

    def __init__(self, members: Sequence[nn.Module], backend: str = "auto", average: str = "prob") -> None:
        super().__init__()
        if backend != AUTO:
            Execution.parse(backend)
        require_choice("average", average, AVERAGES)
        members = list(members)
        if not members:
            raise ValueError("members must hold at least one module, got none")
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"member {index} must be a torch.nn.Module, got {type(member).__name__}")
            if any(is_lazy(tensor) for tensor in (*member.parameters(), *member.buffers())):
                raise ValueError(f"member {index} has uninitialised lazy parameters: run it once on an input before")
        self.members = nn.ModuleList(members)
        self.backend = backend
        self.average = average
        self.tuned: Tuned | None = None  # what "auto" takes, once it was measured
        self.is_view = False  # whether attacks search with it; a view is no judge
        self.view_dtype: torch.dtype | None = None  # of a view in lower precision
        self.replays = False  # whether "auto" replays passes of a view as CUDA graphs, see `replaying`
        self.is_released = False  # whether its weights are gone until it is used again: a view on a CPU
        self._groups: list[MemberGroup] | None = None
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] = []
        self.captures = Captures()  # of attacks on a view
        self._graphs = GraphedCalls()
        self._fused: list[tuple[list[int], FusedMembers]] | None = None
        self._not_fusable = False
        self._trained: list[tuple[list[int], FusedTraining]] | None = None
        self._format = ChannelsLast()

    def execution(self, device: torch.device, training: bool | None = None) -> Execution:
        """How the members run on inputs on `device`, in the ensemble's present mode or the one given."""
        if self.backend != AUTO:
            return Execution.parse(self.backend)
        training = self.training if training is None else training
        if self.tuned is None:
            execution = default_execution(device, self.view_dtype)
        else:
            execution = self.tuned.training if training else self.tuned.attack
        return replace(execution, graph=True) if self.replays and not execution.compile else execution

    @contextmanager
    def replaying(self, device: torch.device) -> Iterator[None]:
        """A `with` block in which "auto" replays a view's passes on a GPU as CUDA graphs, for searches of thousands.

        A shape is captured at its first use, and its activations stay in memory until the block ends.
        """
        self.replays = self.is_view and self.backend == AUTO and device.type == "cuda"
        try:
            yield
        finally:
            self._stop_replaying()

    def _stop_replaying(self) -> None:
        """Also gives back what was captured."""
        if self.replays:
            self.replays, self._graphs = False, GraphedCalls()

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities of the ensemble (B, K), fp32 (fp64 for fp64 members); x as in `member_logits`."""
        return self.combine(self.member_logits(x))

    def combine(self, logits: Tensor) -> Tensor:
        """Member logits (M, B, K) -> log-probabilities of the ensemble (B, K), fp32 (fp64 for fp64 logits)."""
        if self.average == "prob":
            return reference.ensemble_log_prob(logits)
        return logits.to(reference.compute_dtype(logits.dtype)).mean(0).log_softmax(-1)

    def convolutions(self, execution: Execution, device: torch.device) -> AbstractContextManager[object]:
        """A `with` block in which members convolve as that execution says; as torch does where this is a judge."""
        wanted = execution.winograd or (execution.members == "fused" and device.type == "cpu")
        return winograd_convolutions(wanted and (self.training or self.is_view), device)

    def member_logits(self, x: Tensor, per_member: bool | None = None) -> Tensor:
        """Logits of every member, (M, B, K), in member order.

        Args:
            x: one input batch for all members (B, ...), or one for each (M, B, ...).
            per_member: whether x is one batch per member. None: it is if x has 5 dimensions (image batches with a
                member dimension in front) and the first has size M; say it for inputs of another rank.

        Raises:
            ValueError: x has not M batches with `per_member`, or members disagree on K or return no (B, K) tensor.
            RuntimeError: backend="vmap" and a group cannot run batched, or "fused" and they cannot be fused; says why.
        """
        if self.is_released:
            refuse()
        count = len(self.members)
        if per_member is None:
            per_member = x.dim() == 5 and x.shape[0] == count
        elif per_member and (x.dim() < 2 or x.shape[0] != count):
            raise ValueError(f"per_member=True needs x of shape ({count}, B, ...), got {tuple(x.shape)}")
        execution = self.execution(x.device)
        if execution.graph and self._can_capture(x):
            run = partial(self._run, execution, per_member=per_member)
            try:
                return self._graphs((execution, per_member), run, x)
            except RuntimeError:  # not enough memory, or members that wait for the device
                if not self.replays:
                    raise
                self._stop_replaying()
                execution = self.execution(x.device)
        return self._run(execution, x, per_member=per_member)

    def _can_capture(self, x: Tensor) -> bool:
        """Only the frozen view has a gradient for nothing but its input."""
        if x.device.type != "cuda":
            raise RuntimeError(f"backend={self.backend!r}: CUDA graphs need inputs on a CUDA device, got {x.device}")
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        capturing = torch.cuda.is_current_stream_capturing()
        return frozen and x.requires_grad and torch.is_grad_enabled() and not capturing

    def _run(self, execution: Execution, x: Tensor, *, per_member: bool) -> Tensor:
        count = len(self.members)
        if execution.members == "fused":
            logits = self._run_fused(x, per_member) if self.is_view else self._train_fused(x, per_member)
            if logits is not None:
                return logits
        if execution.members != "vmap":
            rows, run = x.unbind(0) if per_member else [x] * count, partial(self._run_each, execution)
            with self.convolutions(execution, x.device):
                if not execution.on_channels_last:
                    return _stack_logits(run(rows))
                # Who names an execution gets it as it is, or its error.
                if self.backend != AUTO:
                    return _stack_logits(run([channels_last(row) for row in rows]))
                return _stack_logits(self._format.run(run, rows, self, own=self.is_view))
        outputs: dict[int, Tensor] = {}
        for group in self._current_groups():
            whole = len(group.indices) == count
            inputs = _rows_of(x, group.indices) if per_member else x
            inputs = channels_last(inputs) if execution.on_channels_last else inputs
            output = group.run(inputs, per_member, must_batch=self.backend != AUTO, compiled=execution.compile)
            if whole and isinstance(output, Tensor) and output.dim() == 3:
                return output
            outputs.update(zip(group.indices, output, strict=True))
        return _stack_logits([outputs[index] for index in range(count)])

    def _run_each(self, execution: Execution, rows: Sequence[Tensor]) -> list[Any]:
        members: Sequence[Callable[..., Any]] = self._compiled_members() if execution.compile else list(self.members)
        if execution.members == "streams" or (execution.members == "fused" and rows[0].is_cuda):
            return run_in_streams(members, rows)
        return [member(row) for member, row in zip(members, rows, strict=True)]

    def _run_fused(self, x: Tensor, per_member: bool) -> Tensor | None:
        """None where they have to run another way."""
        if self._not_fusable or x.numel() == 0 or is_transformed(x.device.type):
            return None
        sample = x[:1, 0] if per_member else x[:1]
        try:
            if self._fused is None:
                groups = group_members(list(self.members))
                self._fused = [(group, FusedMembers([self.members[i] for i in group], sample)) for group in groups]
            return _run_groups(self._fused, x, per_member)
        except NotFusableError as error:
            if self.backend != AUTO:
                raise RuntimeError(f"backend {self.backend!r} cannot run the members: {error}") from error
            self._not_fusable = True
            return None

    def _train_fused(self, x: Tensor, per_member: bool) -> Tensor | None:
        """None where they have to run another way: it has gradients for parameters alone, and trains in bf16."""
        if not (self.training and x.is_cuda and torch.is_grad_enabled()) or x.requires_grad or x.numel() == 0:
            return None
        if self._not_fusable or is_traced() or torch._C._len_torch_function_stack():
            return None
        if not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") != torch.bfloat16:
            return None
        try:
            if self._trained is None or not all(fused.is_current() for _, fused in self._trained):
                groups = group_members(list(self.members))
                sample = x[0] if per_member else x
                self._trained = [
                    (group, FusedTraining([self.members[i] for i in group], sample, torch.bfloat16)) for group in groups
                ]
            return _run_groups(self._trained, x, per_member)
        except NotFusableError:
            self._not_fusable = True
            return None

    def _compiled_members(self) -> list[Callable[..., Any]]:
        if [member for member, _ in self._compiled] != list(self.members):
            self._compiled = [(member, torch.compile(member)) for member in self.members]
        return [compiled for _, compiled in self._compiled]

    def weights_changed(self) -> None:
        """What was made from the members' weights follows them: for views, whose weights are copies."""
        self.is_released = False
        for _, fused in self._fused or ():
            fused.refresh()

    def release(self) -> None:
        """Drop what was made from the members' weights, until `weights_changed`."""
        self.is_released = True
        for _, fused in self._fused or ():
            fused.release()

    def regroup(self) -> None:
        """Compare the members' architectures anew before the next run."""
        self._groups = None

    def _current_groups(self) -> list[MemberGroup]:
        members = list(self.members)
        if self._groups is None or not _is_current(self._groups, members):
            self._groups = [MemberGroup(group, [members[i] for i in group]) for group in group_members(members)]
        return self._groups

    def __getstate__(self) -> dict[str, Any]:
        # A copy has storage of its own; it makes its own groups.
        fresh: dict[str, Any] = {
            "_groups": None,
            "_compiled": [],
            "captures": Captures(),
            "_graphs": GraphedCalls(),
            "_fused": None,
            "_trained": None,
            "_not_fusable": False,
            "_format": ChannelsLast(),
        }
        return {**self.__dict__, **fresh}

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}, average={self.average!r}"


def is_ensemble(model: nn.Module) -> TypeGuard[Ensemble]:
    """Whether the model's output is `combine` of its `member_logits`: an `Ensemble` without hooks or another forward.

    What attacks and verdicts know about ensembles is true of these; all others are modules with logits out.
    """
    if not isinstance(model, Ensemble) or "forward" in vars(model) or has_hooks(model):
        return False
    return type(model).forward is Ensemble.forward


def _is_current(groups: Sequence[MemberGroup], members: Sequence[nn.Module]) -> bool:
    grouped = {index: member for group in groups for index, member in zip(group.indices, group.members, strict=True)}
    return grouped == dict(enumerate(members)) and all(group.is_current() for group in groups)


def _run_groups(groups: Sequence[tuple[list[int], Callable[[Tensor], Tensor]]], x: Tensor, per_member: bool) -> Tensor:
    """Networks of the members at these indices, (M' * B, ...) -> (M' * B, K), on x of all; -> (M, B, K)."""
    outputs: dict[int, Tensor] = {}
    for indices, run in groups:
        rows = _rows_of(x, indices) if per_member else x.expand(len(indices), *x.shape)
        outputs.update(zip(indices, run(rows.flatten(0, 1)).chunk(len(indices)), strict=True))
    return _stack_logits([outputs[index] for index in range(len(outputs))])


def _rows_of(x: Tensor, indices: Sequence[int]) -> Tensor:
    """`x[indices]` without indices on the device, whose copy a CUDA graph could not hold."""
    return x if list(indices) == list(range(len(x))) else torch.stack([x[index] for index in indices])


def _stack_logits(outputs: Sequence[Any]) -> Tensor:
    for index, output in enumerate(outputs):
        if not isinstance(output, Tensor) or output.dim() != 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"member {index} must return logits (B, K), got {got}")
    classes = [output.shape[1] for output in outputs]
    if len(set(classes)) > 1:
        raise ValueError(f"members must have the same number of classes, got {classes}")
    return torch.stack(list(outputs))
