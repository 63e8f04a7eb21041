"""The samples on which an attack succeeds most clearly, before and after it, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ceat_fast.files import PathLike, write_atomic

_TENSORS = ("clean", "adversarial", "labels", "clean_predictions", "adversarial_predictions", "samples")


class Examples(NamedTuple):
    """Some test images, what an attack made of them, and what the ensemble (or model) answers; on the CPU."""

    attack: str
    eps: float
    clean: Tensor  # (E, C, H, W) in [0, 1]
    adversarial: Tensor  # (E, C, H, W)
    labels: Tensor  # (E,)
    clean_predictions: Tensor  # (E,)
    adversarial_predictions: Tensor  # (E,)
    samples: Tensor  # (E,) positions among the judged samples

    def save(self, path: PathLike) -> None:
        """Write a safetensors file, atomically."""
        tensors = {name: getattr(self, name).clone().contiguous() for name in _TENSORS}
        write_atomic(path, save(tensors, {"attack": self.attack, "eps": repr(self.eps)}))

    @classmethod
    def load(cls, path: PathLike) -> Examples:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else, or is damaged.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                about = file.metadata()
                return cls(about["attack"], float(about["eps"]), *(file.get_tensor(name) for name in _TENSORS))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} holds no examples, or is damaged ({error}); evaluate again, or remove it"
            ) from error
