"""Attacked inputs kept on the disk, unrounded, one safetensors file per batch."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ceat_fast.evaluation.verdicts import ENSEMBLE, MEMBERS
from ceat_fast.files import PathLike, write_atomic

_FOLDER = "adversarials"


class AdversarialStore:
    """Writes the inputs that an evaluation makes, beside its journal in `folder`."""

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder) / _FOLDER

    def holds(self, attack: str, key: str, goal: str, batch: range) -> bool:
        return self._path(attack, key, goal, batch).is_file()

    def add(self, attack: str, key: str, goal: str, batch: range, inputs: Tensor) -> None:
        """Keep the inputs (S, B, ...) against the S subjects of the goal."""
        path = self._path(attack, key, goal, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"inputs": inputs.cpu().contiguous(), "sample": torch.arange(batch.start, batch.stop)}
        write_atomic(path, save(tensors, {"attack": attack, "goal": goal}))

    def _path(self, attack: str, key: str, goal: str, batch: range) -> Path:
        name = re.sub(r"[^\w.=-]+", "-", attack)
        return self.folder / f"{name}-{key}" / f"{goal}-{batch.start:07d}-{batch.stop:07d}.safetensors"


def load_adversarials(folder: PathLike, attack: str, subject: str = "ensemble") -> tuple[Tensor, Tensor]:
    """The inputs that an evaluation with `keep_adversarials` made.

    Args:
        folder: where its journal lies.
        attack: name of the attack.
        subject: "ensemble" or "model", or "member 0" and so on.

    Returns:
        (inputs (N, ...) as the attack returned them, their positions (N,) among the judged samples), in rising order.

    Raises:
        ValueError: there are none.
    """
    member = re.fullmatch(r"member (\d+)", subject)
    goal, row = (MEMBERS, int(member[1])) if member else (ENSEMBLE, 0)
    found: dict[int, Tensor] = {}
    for path in sorted((Path(folder) / _FOLDER).glob(f"*/{goal}-*.safetensors")):
        with safe_open(path, "pt") as file:
            if file.metadata()["attack"] == attack and row < file.get_slice("inputs").get_shape()[0]:
                inputs = file.get_slice("inputs")[row]
                found |= dict(zip(file.get_tensor("sample").tolist(), inputs, strict=True))
    if not found:
        raise ValueError(f"{str(folder)!r} keeps no inputs of {attack!r} against {subject!r}")
    samples = sorted(found)
    return torch.stack([found[sample] for sample in samples]), torch.tensor(samples)
