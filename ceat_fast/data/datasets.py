"""Data sets by name: the digits that ship with the package, and CIFAR-10/100 and SVHN through torchvision."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ceat_fast.choices import unknown_name
from ceat_fast.imports import call_function

ROOT_VARIABLE = "CEAT_FAST_DATA"

File = tuple[Path, str]  # path and md5


@dataclass(frozen=True)
class Dataset:
    """Images in memory, `train_images.float() / scale` lies in [0, 1].

    Attributes:
        name: as given to `load_dataset`.
        train_images, test_images: (N, C, H, W) uint8.
        train_labels, test_labels: (N,) int64 in [0, num_classes).
        num_classes: K.
        scale: the uint8 value that means 1.0.
        augment: the augmentation that suits the images (see `iterate_batches`).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    scale: float
    augment: str

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[1]


def load_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set by name: "digits" (embedded), "cifar10", "cifar100" or "svhn" (torchvision), or one of your own.

    Args:
        name: a key of `DATASETS`, or "package.module:function", which is imported and called as `function(root)`; the
            import runs that module's code.
        root: folder of the files; default: the environment variable CEAT_FAST_DATA, or else ./data. Files that are
            missing there are downloaded to it. "digits" needs no files.

    Raises:
        ValueError: unknown name (names the nearest one), a damaged file (names it), a "module:function" that is not
            there or does not take the folder, or that returned something else than a `Dataset`.
        ImportError: torchvision (or scipy, for SVHN) is not installed.
        FileNotFoundError: files are missing and cannot be downloaded; says which file goes where.
    """
    require_dataset_name(name)
    folder = data_folder(root)
    if name in DATASETS:
        return DATASETS[name](folder)
    dataset = call_function("data set", name, folder)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"data set {name!r} must return a ceat_fast.data.Dataset, got {type(dataset).__name__}")
    return dataset


def data_folder(root: str | Path | None = None) -> Path:
    """Where the files of data sets are: `root`, or else $CEAT_FAST_DATA, or else ./data."""
    return Path(root if root is not None else os.environ.get(ROOT_VARIABLE, "data"))


def require_dataset_name(name: str) -> None:
    """Raise ValueError unless `name` is a key of `DATASETS` or has the form "module:function"."""
    if name not in DATASETS and ":" not in name:
        raise ValueError(unknown_name("data set", name, DATASETS) + '; for your own write "module:function"')


def _load_digits(root: Path) -> Dataset:
    """The 1,797 handwritten digits (8x8, values 0 to 16) that scikit-learn ships too, in the same order.

    Source: the test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine
    Learning Repository (1998), https://doi.org/10.24432/C50P49, licence CC BY 4.0. A fixed random fifth (360) is
    for testing, the rest (1,437) for training.
    """
    import numpy

    with (
        resources.files(__package__).joinpath("digits.npz").open("rb") as file,
        numpy.load(file) as arrays,
    ):
        images = torch.from_numpy(arrays["images"]).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"]).long()
    # numpy promises that the numbers of RandomState never change.
    is_test = torch.zeros(len(images), dtype=torch.bool)
    is_test[numpy.random.RandomState(0).permutation(len(images))[:360]] = True
    return Dataset(
        "digits", images[~is_test], labels[~is_test], images[is_test], labels[is_test], 10, scale=16.0, augment="none"
    )


def _load_cifar(root: Path, name: str, class_name: str, num_classes: int) -> Dataset:
    source = getattr(_torchvision_datasets(), class_name)
    listed = [
        *source.train_list,
        *source.test_list,
        (source.meta["filename"], source.meta["md5"]),
    ]
    files = [(root / source.base_folder / file, md5) for file, md5 in listed]
    remedy = f"fetch {source.url} and put it at {root / source.filename} (it is unpacked on the next call)"
    archive = (root / source.filename, source.tgz_md5)
    _obtain(files, lambda: source(root, download=True), remedy, archive)
    train, test = source(root, train=True), source(root, train=False)
    return Dataset(
        name,
        torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(train.targets),
        torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(test.targets),
        num_classes,
        255.0,
        "crop_flip",
    )


def _load_svhn(root: Path) -> Dataset:
    source = _torchvision_datasets().SVHN
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("data set 'svhn' comes in MATLAB files, which need scipy: pip install scipy")
    parts = [source.split_list[split] for split in ("train", "test")]
    files = [(root / file, md5) for _, file, md5 in parts]
    remedy = " and ".join(f"fetch {url} and put it at {root / file}" for url, file, _ in parts)
    _obtain(
        files,
        lambda: [source(root, split, download=True) for split in ("train", "test")],
        remedy,
    )
    train, test = source(root, "train"), source(root, "test")
    return Dataset(
        "svhn",
        torch.from_numpy(train.data).contiguous(),
        torch.from_numpy(train.labels),
        torch.from_numpy(test.data).contiguous(),
        torch.from_numpy(test.labels),
        10,
        255.0,
        "crop",
    )


def _torchvision_datasets() -> ModuleType:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            'this data set is read through torchvision, which cannot be imported: pip install "ceat_fast[vision]"'
        ) from error
    module: ModuleType = datasets
    return module


def _obtain(
    files: Sequence[File],
    download: Callable[[], object],
    remedy: str,
    archive: File | None = None,
) -> None:
    """Make sure that every file exists and is intact; unpack the archive or download where one is missing."""
    _refuse_damaged(files, remedy)
    missing = [path for path, _ in files if not path.exists()]
    if not missing:
        return
    if archive is not None:
        _refuse_damaged([archive], remedy)
    try:
        download()
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{missing[0]} is missing and cannot be downloaded ({error}); {remedy}") from error


def _refuse_damaged(files: Sequence[File], remedy: str) -> None:
    damaged = [str(path) for path, md5 in files if path.exists() and _md5(path) != md5]
    if damaged:
        raise ValueError(f"damaged (wrong md5): {', '.join(damaged)}; delete and call again, or {remedy}")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _load_digits,
    "cifar10": lambda root: _load_cifar(root, "cifar10", "CIFAR10", 10),
    "cifar100": lambda root: _load_cifar(root, "cifar100", "CIFAR100", 100),
    "svhn": _load_svhn,
}
