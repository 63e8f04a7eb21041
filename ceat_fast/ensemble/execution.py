"""How the members of an ensemble run: one after the other, in CUDA streams, batched by vmap, or as one network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from ceat_fast.choices import unknown_name
from ceat_fast.ops import triton_backend, winograd

MEMBERS = ("loop", "vmap", "streams", "fused")
AUTO = "auto"


@dataclass(frozen=True)
class Execution:
    """One way to run the members; its text is for example "loop+channels_last+compile".

    Args:
        members: "loop" runs one after the other; "streams" each on a CUDA stream of its own; "vmap" members of one
            architecture as one batched module; "fused", on CUDA with Triton or on the CPU: attacked views of one
            architecture as one network whose convolutions take addition and ReLU along, in channels_last; in training
            as "streams" on CUDA, as "loop+channels_last+winograd" on the CPU.
        channels_last: image batches (B, C, H, W), and the weights of an attacked view, in that memory format.
        compile: through torch.compile.
        graph: on CUDA, replay the frozen view's forward and backward as CUDA graphs, or all steps of a search whose
            number is fixed. Where there is nothing to capture (in training, or without a gradient for the input) it
            makes no difference.
        winograd: on the CPU, the 3x3 convolutions of attacked views and of training by `winograd_convolution`, where it
            takes them. Other calls of an ensemble in eval mode, verdicts among them, keep torch's arithmetic.
    """

    members: str = "loop"
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    winograd: bool = False

    def __str__(self) -> str:
        return "+".join([self.members, *(f.name for f in fields(self)[1:] if getattr(self, f.name))])

    @classmethod
    def parse(cls, text: str) -> Execution:
        """The execution of that text.

        Raises:
            ValueError: an unknown way or option, or options that exclude each other.
        """
        members, *options = text.split("+") if isinstance(text, str) else [text]
        if members not in MEMBERS:
            raise ValueError(unknown_name("backend", members, (AUTO, *MEMBERS)))
        known = [f.name for f in fields(cls)[1:]]
        for option in options:
            if option not in known:
                raise ValueError(unknown_name(f"option of backend {text!r}", option, known))
        if members == "fused" and not set(options) <= {"graph"}:
            raise ValueError(f"backend {text!r}: 'fused' goes with no option but graph")
        if "winograd" in options and (members != "loop" or "compile" in options):
            raise ValueError(f"backend {text!r}: winograd is for 'loop', and without compile")
        return cls(members, **dict.fromkeys(options, True))

    @property
    def on_channels_last(self) -> bool:
        """Whether image batches are to be in that memory format."""
        return self.channels_last or self.members == "fused"


class Tuned(NamedTuple):
    """The executions that were measured to be the fastest, for the two kinds of work."""

    attack: Execution  # eval mode: the gradient for the input, and verdicts
    training: Execution  # train mode: the gradient for the weights


def default_execution(device: torch.device, view_dtype: torch.dtype | None = None) -> Execution:
    """What "auto" takes where nothing was measured; `view_dtype` is that of an attack's view in lower precision.

    On a GPU streams in channels_last were the fastest way through torch's own kernels, in attacks and in training, and
    our own are faster in bf16. On a CPU our own are the fastest, where they were built.
    """
    if device.type == "cuda":
        own = view_dtype == torch.bfloat16 and triton_backend.missing("cuda") is None
        return Execution("fused") if own else Execution("streams", channels_last=True)
    if device.type != "cpu":
        return Execution("vmap")
    return Execution("fused") if winograd.missing() is None else Execution("loop", channels_last=True)
