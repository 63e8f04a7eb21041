"""Runs of convolutions in a fused network that are one launch: which ones they are, and how they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ceat_fast.ensemble.member_layers import Convolution
from ceat_fast.ensemble.traced import Operation, images
from ceat_fast.ops.chain import MAX_LINKS, Chain, Link, can_be_link


@dataclass(frozen=True)
class MemberChain:
    """Convolutions each of which takes the output of the one before; nobody else sees what lies between them."""

    convolutions: Sequence[Convolution]
    chain: Chain

    @property
    def output(self) -> fx.Node:
        return self.convolutions[-1].output

    @property
    def x(self) -> fx.Node:
        return self.convolutions[0].x

    @property
    def residual(self) -> fx.Node | None:
        return self.convolutions[0].residual

    @property
    def inputs(self) -> list[fx.Node]:
        return [self.x] if self.residual is None else [self.x, self.residual]

    def run(self, x: Tensor, residual: Tensor | None, *, masked: bool) -> tuple[Tensor, Tensor]:
        """(M * B, C, H, W), channels last -> (output, masks for `input_gradient`)."""
        layer = self.convolutions[0].layer
        skip = None if residual is None else layer.filled_rows(residual)
        rows, masks = self.chain.run(layer.filled_rows(x), skip, masked=masked)
        return images(rows), masks

    def input_gradient(self, grad: Tensor, masks: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradients for x and for the residual, if there is one; see `Chain.input_gradient`."""
        layer = self.convolutions[0].layer
        gate_rows = None if gate is None else layer.filled_rows(gate)
        rows, others = self.chain.input_gradient(layer.filled_rows(grad), masks, gate_rows)
        return images(rows)[:, : layer.channels], None if self.residual is None else images(others)


def with_chains(
    steps: Sequence[Convolution | Operation], uses: Counter[fx.Node]
) -> list[Convolution | Operation | MemberChain]:
    """The steps with chains in the place of those convolutions that can form some."""
    found: list[Convolution | Operation | MemberChain] = []
    place = 0
    while place < len(steps):
        run: list[Convolution] = []
        for step in steps[place : place + MAX_LINKS]:
            if not isinstance(step, Convolution) or not _continues(run, step):
                break
            run.append(step)
        while run and not _is_closed(run, uses):
            run.pop()
        if run:
            found.append(_chain(run))
        else:
            found.append(steps[place])
        place += max(1, len(run))
    return found


def _continues(run: Sequence[Convolution], step: Convolution) -> bool:
    shape = step.output.meta["shape"]
    if not can_be_link(step.layer.weights, *shape[2:]):
        return False
    if not run:
        return True
    before = run[-1]
    same = step.layer.weights.channels == before.layer.weights.channels and step.layer.channels == shape[1]
    return same and step.x is before.output and step.residual in (None, before.x)


def _is_closed(run: Sequence[Convolution], uses: Counter[fx.Node]) -> bool:
    """Whether what lies between the convolutions is used by them alone."""
    own = Counter(node for step in run for node in (step.x, step.residual) if node is not None)
    return all(own[step.output] == uses[step.output] for step in run[:-1])


def _chain(run: Sequence[Convolution]) -> MemberChain:
    links = [Link(step.layer.weights, step.residual is not None, step.relu) for step in run]
    return MemberChain(tuple(run), Chain(links))
