"""What must be equal for two sessions to belong to one evaluation: weights, data, attack settings, package version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ceat_fast
from ceat_fast.attacks import parse_budget

_COMPILED = "_orig_mod."  # what torch.compile puts into the names
_BUDGETS = ("eps", "alpha")
_FREE = ("goal", "batch_size")  # set by the evaluation; of no influence on the result


def identity(model: nn.Module, images: Tensor, labels: Tensor, index: Tensor) -> dict[str, str]:
    """Digests of a model and its test data, and the version of this package, by name."""
    return {
        "weights": digest_model(model),
        "data": digest_tensors({"images": images, "labels": labels, "index": index}),
        "ceat_fast version": ceat_fast.__version__,
    }


def digest_model(model: nn.Module) -> str:
    """Digest of the classes of all submodules and of every parameter and buffer, compiled or not."""
    classes = [(_plain(name), type(module).__qualname__) for name, module in model.named_modules()]
    outline = sorted((name, kind) for name, kind in classes if kind != "OptimizedModule")
    average = getattr(model, "average", None)
    tensors = {_plain(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return _digest(json.dumps([outline, average]).encode(), digest_tensors(tensors).encode())


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, types, shapes and values; the device does not matter."""
    parts: list[bytes] = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return _digest(*parts)


def describe_attack(attack: Any) -> dict[str, Any]:
    """The settings of an attack as plain JSON values; budgets as given, as a number, and in units of 1/255.

    Raises:
        TypeError: not a dataclass, whose settings could not be recorded.
    """
    if not is_dataclass(attack) or isinstance(attack, type):
        raise TypeError(f"an attack must be a dataclass, whose fields are its settings, got {attack!r}")
    settings: dict[str, Any] = {"attack": type(attack).__name__}
    for setting in fields(attack):
        value = getattr(attack, setting.name)
        if setting.name in _BUDGETS and value is not None:
            number = parse_budget(setting.name, value)
            settings |= {setting.name: number, f"{setting.name}_as_given": str(value)}
            settings |= {"eps_255": number * 255} if setting.name == "eps" else {}
        elif setting.name not in _FREE:
            settings[setting.name] = _plain_value(value)
    return settings


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Sentences "name: value there, value here" for what differs."""
    names = [*here, *(name for name in there if name not in here)]
    return [
        f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names if there.get(name) != here.get(name)
    ]


def key_of(identity: Mapping[str, Any], attack: str, settings: Mapping[str, Any]) -> str:
    """Short digest that ties a record to the evaluation and the attack settings that it was made with."""
    return _digest(json.dumps([identity, attack, settings], sort_keys=True).encode())


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "").removesuffix(_COMPILED[:-1])


def _plain_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain_value(item) for item in value]
    if isinstance(value, Tensor):
        return digest_tensors({"": value})
    if is_dataclass(value) and not isinstance(value, type):
        return describe_attack(value)
    return str(value)


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()
