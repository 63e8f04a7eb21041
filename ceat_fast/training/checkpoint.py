"""Checkpoints: folders that hold the whole state of a run after a number of optimizer steps.

    checkpoints/step-000001950/     the newest few of these
        weights.safetensors         the members as they are trained, under the ensemble's own names
        average.safetensors         their average, where the run keeps one
        state.pt                    optimizer, position, statistics of the epoch; loadable with weights_only=True
        manifest.json               format, version, and the size and SHA-256 of each file
    checkpoints/best-000001560/     the weights with the highest robust accuracy on held-out images

A checkpoint appears under its name only when complete and flushed to the disk. What was damaged later is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ceat_fast.files import remove_folder, write_atomic, write_folder

FORMAT, VERSION = "ceat_fast checkpoint", 2
WEIGHTS, AVERAGE, STATE, MANIFEST = "weights.safetensors", "average.safetensors", "state.pt", "manifest.json"
STEP, BEST = "step", "best"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another format, or missing; the message says which and what is wrong."""


class Checkpoint(NamedTuple):
    """The state after `step` optimizer steps."""

    step: int
    weights: Mapping[str, Tensor]  # the ensemble's state_dict
    average: Mapping[str, Tensor] | None  # that of the averaged ensemble
    state: dict[str, Any] | None  # what else is needed to continue: plain values and tensors; None for judging only


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, kind: str = STEP) -> Path:
    """Write the checkpoint into `folder`, then keep it and the newest of its kind, `keep` in all; returns its path.

    Saving the same step again replaces it only if the one that is there is damaged.

    Raises:
        OSError: it cannot be written, for example on a full disk; the older ones are still there.
    """
    path = folder / f"{kind}-{checkpoint.step:09d}"
    if path.exists():
        if _damage(path) is None:
            return path
        remove_folder(path)
    contents = {WEIGHTS: save(plain_copies(checkpoint.weights))}
    if checkpoint.average is not None:
        contents[AVERAGE] = save(plain_copies(checkpoint.average))
    if checkpoint.state is not None:
        buffer = io.BytesIO()
        torch.save(checkpoint.state, buffer)
        contents[STATE] = buffer.getvalue()
    contents[MANIFEST] = _manifest(checkpoint.step, contents)

    def fill(temporary: Path) -> None:
        for name, data in contents.items():
            write_atomic(temporary / name, data)

    try:
        write_folder(path, fill)
    except OSError as error:
        kept = checkpoints(folder, kind)
        raise OSError(f"cannot save {path}: {error}; newest one: {kept[0] if kept else 'none'}") from error
    # Higher steps than this one's are of what was trained before a resume.
    for old in [other for other in checkpoints(folder, kind) if other != path][keep - 1 :]:
        remove_folder(old)
    return path


def checkpoints(folder: Path, kind: str = STEP) -> list[Path]:
    """The complete checkpoints in `folder`, newest first."""
    named = [path for path in folder.glob(kind + "-*") if re.fullmatch(kind + r"-\d+", path.name) and path.is_dir()]
    return sorted(named, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The number of optimizer steps that the name of a checkpoint says."""
    return int(path.name.partition("-")[2])


def usable_checkpoint(folder: Path, warn: Callable[[str], object], kind: str = STEP) -> Path | None:
    """The newest undamaged checkpoint, or None where there is none at all; `warn` is told of each that is passed over.

    Raises:
        CheckpointError: there are some and none can be used.
    """
    refused: list[str] = []
    for path in checkpoints(folder, kind):
        damage = _damage(path)
        if damage is None:
            for message in refused:
                warn(f"{message}; using {path.name}")
            return path
        refused.append(f"checkpoint {path} cannot be used: {damage}")
    if refused:
        raise CheckpointError("; ".join(refused) + "; no earlier one is left")
    return None


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Read a whole checkpoint.

    Raises:
        CheckpointError: it is damaged, of another format, or holds weights only.
    """
    _require_intact(path)
    if not (path / STATE).is_file():
        raise CheckpointError(f"checkpoint {path} holds weights only: training cannot continue from it")
    step = json.loads((path / MANIFEST).read_text())["step"]
    average = load_file(path / AVERAGE) if (path / AVERAGE).is_file() else None
    return Checkpoint(
        step, load_file(path / WEIGHTS), average, torch.load(path / STATE, map_location=device, weights_only=True)
    )


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights to judge: the averaged ones where the run keeps an average.

    Raises:
        CheckpointError: the checkpoint is damaged or of another format.
    """
    _require_intact(path)
    return load_file(path / (AVERAGE if (path / AVERAGE).is_file() else WEIGHTS))


def _require_intact(path: Path) -> None:
    damage = _damage(path)
    if damage is not None:
        raise CheckpointError(f"checkpoint {path} cannot be used: {damage}")


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of the format {manifest['format']!r}, not {FORMAT!r}"
        if manifest["version"] != VERSION:
            return f"it has version {manifest['version']}, and this ceat_fast reads version {VERSION}"
        for name, expected in manifest["files"].items():
            data = (path / name).read_bytes()
            if len(data) != expected["bytes"]:
                return f"{name} has {len(data)} bytes instead of {expected['bytes']}"
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                return f"{name} does not have the checksum that {MANIFEST} gives"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    except (KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not that of a checkpoint ({error!r})"
    return None


def _manifest(step: int, contents: Mapping[str, bytes]) -> bytes:
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    tree = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    return (json.dumps(tree, indent=2) + "\n").encode()


def plain_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU as safetensors takes them: it refuses views into storage that members share."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
