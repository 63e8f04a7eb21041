"""A whole training step, attack included, as one CUDA graph: a few thousand launches become one.

The graph replays kernels on the memory that it was captured with. So the batch, the seed of the attack and the learning
rate are tensors that are filled before each replay, and nothing in a step may depend on a number that the host reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from ceat_fast.attacks import PGD
from ceat_fast.ensemble.graphs import beside, capture
from ceat_fast.methods import Batch, Method, StepOutput

Train = Callable[[PGD, Batch], StepOutput]
WARM_UPS = 3  # steps before the capture: they allocate what a step keeps, and let cuDNN choose its kernels


def obstacle(method: Method, device: torch.device, precision: str, is_alone: bool) -> str | None:
    """Why steps of such a run cannot be captured, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {str(device)!r}"
    if not method.capturable:
        return f"{type(method).__name__} looks at values on the host"
    if precision == "fp16":
        return "the loss scale of precision 'fp16' is adapted on the host"
    if not is_alone:
        return "several processes exchange gradients"
    return None


class CapturedStep:
    """Calls `train` for the first steps, then captures it once and replays it.

    All attacks must be equal but for their seed, and all batches of one shape. The tensors of an output hold until the
    next step.

    Args:
        train: makes one step on the device.
        required: raise where a step cannot be captured, instead of a warning and steps without a graph.
    """

    def __init__(self, train: Train, required: bool) -> None:
        self._train = train
        self._required = required
        self._warm_ups = 0
        self._refused = False
        self._batch: Batch | None = None
        self._seed = torch.zeros(())
        self._replay: Callable[[], StepOutput] | None = None

    def __call__(self, attack: PGD, batch: Batch) -> StepOutput:
        """One step.

        Raises:
            RuntimeError: the step cannot be captured, and it is required.
        """
        if self._refused:
            return self._train(attack, batch)
        if self._warm_ups < WARM_UPS:
            self._warm_ups += 1
            return beside(lambda: self._train(attack, batch), batch.images.device)
        self._fill(attack, batch)
        if self._replay is None and not self._capture(attack):
            return self._train(attack, batch)
        assert self._replay is not None
        return self._replay()

    def _fill(self, attack: PGD, batch: Batch) -> None:
        if self._batch is None:
            self._batch = Batch(*(tensor.clone() for tensor in batch))
            self._seed = torch.zeros((), dtype=torch.int64, device=batch.images.device)
        for place, value in zip(self._batch, batch, strict=True):
            place.copy_(value)
        assert isinstance(attack.seed, int)
        self._seed.fill_(attack.seed)

    def _capture(self, attack: PGD) -> bool:
        keyed, batch = replace(attack, seed=self._seed), self._batch
        assert batch is not None
        try:
            self._replay = capture(lambda: self._train(keyed, batch))
        except RuntimeError as error:
            text = f"the training step cannot be captured as a CUDA graph ({str(error).splitlines()[0]})"
            if self._required:
                raise RuntimeError(f"cuda_graph='on': {text}; cuda_graph='off' trains without") from error
            warnings.warn(f"{text}: it runs without; cuda_graph='off' says so from the start", stacklevel=2)
            self._refused, self._batch = True, None
            return False
        return True
