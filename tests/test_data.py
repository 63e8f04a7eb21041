"""Data sets and batches. Nothing here needs the internet or files beyond the package."""

from __future__ import annotations

import builtins
import hashlib
import importlib.util
import os
import pickle
import urllib.error
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ceat_fast.data import Dataset, iterate_batches, load_dataset
from ceat_fast.data.batches import crop_flip
from ceat_fast.data.datasets import ROOT_VARIABLE


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_digits_are_split_1437_to_360(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert (digits.num_classes, digits.scale, digits.in_channels) == (10, 16.0, 1)
    assert digits.train_labels.bincount().tolist() == [151, 147, 141, 154, 151, 142, 137, 140, 135, 139]
    assert digits.test_labels.bincount().tolist() == [27, 35, 36, 29, 30, 40, 44, 39, 39, 41]


def test_digits_are_those_of_scikit_learn(digits):
    datasets = pytest.importorskip("sklearn.datasets", reason="compares with scikit-learn's copy")
    original = datasets.load_digits()
    is_test = np.isin(np.arange(1797), np.random.RandomState(0).permutation(1797)[:360])
    for part, images, labels in (
        (~is_test, digits.train_images, digits.train_labels),
        (is_test, digits.test_images, digits.test_labels),
    ):
        np.testing.assert_array_equal(images.squeeze(1).numpy(), original.images[part])
        np.testing.assert_array_equal(labels.numpy(), original.target[part])


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar_10' .*did you mean 'cifar10'"):
        load_dataset("cifar_10")


def test_missing_torchvision_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"ceat_fast\[vision\]"):
        load_dataset("cifar10")


@pytest.fixture
def torchvision_datasets(monkeypatch):
    """torchvision's data sets on a machine without internet."""
    datasets = pytest.importorskip("torchvision.datasets", reason="tests the loaders that use torchvision")

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no internet")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    return datasets


@pytest.mark.parametrize(
    ("name", "missing", "remedy"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python/train", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat", "test_32x32.mat"),
    ],
)
@pytest.mark.usefixtures("torchvision_datasets")
def test_without_internet_the_error_says_which_file_goes_where(name, missing, remedy, tmp_path):
    if name == "svhn":
        pytest.importorskip("scipy", reason="SVHN is read with scipy")
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / missing} is missing" in message
    assert f"put it at {tmp_path / remedy}" in message
    assert "no internet" in message


@pytest.mark.usefixtures("torchvision_datasets")
def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_dataset("cifar10")


@pytest.mark.usefixtures("torchvision_datasets")
@pytest.mark.parametrize("damaged", ["cifar-10-batches-py/test_batch", "cifar-10-python.tar.gz"])
def test_a_damaged_file_is_named(damaged, tmp_path):
    path = tmp_path / damaged
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="wrong md5") as caught:
        load_dataset("cifar10", tmp_path)
    assert str(path) in str(caught.value)


def test_svhn_without_scipy_says_so(torchvision_datasets, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else find_spec(name, *a))
    with pytest.raises(ImportError, match="pip install scipy"):
        load_dataset("svhn")


def test_cifar_files_are_read_in_channel_first_order(torchvision_datasets, tmp_path, monkeypatch):
    """A CIFAR-10 of two images per file, with its own checksums in place of the official ones."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    pixels = (np.arange(2 * 3072) % 251).astype(np.uint8).reshape(2, 3072)
    source = torchvision_datasets.CIFAR10
    train = [write(f"data_batch_{i}", {"data": pixels + i, "labels": [i, i + 1]}) for i in range(1, 6)]
    monkeypatch.setattr(source, "train_list", train)
    monkeypatch.setattr(source, "test_list", [write("test_batch", {"data": pixels, "labels": [8, 9]})])
    name, md5 = write("batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(source, "meta", {"filename": name, "key": "label_names", "md5": md5})

    data = load_dataset("cifar10", tmp_path)
    assert data.train_images.shape == (10, 3, 32, 32)
    assert data.train_labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert data.test_labels.tolist() == [8, 9]
    assert torch.equal(data.test_images, torch.from_numpy(pixels).view(2, 3, 32, 32))
    assert (data.num_classes, data.scale, data.augment) == (10, 255.0, "crop_flip")


def test_svhn_is_cropped_and_not_mirrored(
    torchvision_datasets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SVHN of two images per file, with its own checksums; the digit 0 has the label 10."""
    io = pytest.importorskip("scipy.io", reason="SVHN is read with scipy")
    pixels = (np.arange(2 * 3072) % 251).astype(np.uint8).reshape(2, 3, 32, 32)
    files = {}
    for split, labels in (("train", [1, 10]), ("test", [9, 2])):
        path = tmp_path / f"{split}.mat"
        io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": np.array(labels)[:, None]})
        files[split] = ["https://", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", files)
    data = load_dataset("svhn", tmp_path)
    assert torch.equal(data.train_images, torch.from_numpy(pixels))
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([1, 0], [9, 2])
    assert (data.num_classes, data.scale, data.augment) == (10, 255.0, "crop")


def test_official_cifar10():
    root = os.environ.get(ROOT_VARIABLE)
    if root is None or not (Path(root) / "cifar-10-batches-py").is_dir():
        pytest.skip(f"set {ROOT_VARIABLE} to a folder that holds cifar-10-batches-py")
    data = load_dataset("cifar10")
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    mean = data.train_images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=1e-4, rtol=0)


def collect(*args, **kwargs):
    return [torch.cat(parts) for parts in zip(*iterate_batches(*args, **kwargs), strict=True)]


def test_batches_in_order_are_the_images(digits):
    x, y, index = collect(digits.test_images, digits.test_labels, 100, scale=digits.scale)
    assert torch.equal(x * 16, digits.test_images.float())
    assert torch.equal(y, digits.test_labels)
    assert index.tolist() == list(range(360))
    assert (x.min().item(), x.max().item()) == (0.0, 1.0)


def test_shuffled_batches_visit_every_sample_once(digits):
    generator = torch.Generator().manual_seed(3)
    x, y, index = collect(digits.test_images, digits.test_labels, 128, generator, scale=16)
    assert sorted(index.tolist()) == list(range(360))
    assert index.tolist() != list(range(360))
    assert torch.equal(x, digits.test_images[index].float() / 16)
    assert torch.equal(y, digits.test_labels[index])


def test_the_generator_state_at_the_start_fixes_a_pass(digits):
    def first_pass(batches_read_before):
        generator = torch.Generator().manual_seed(5)
        batches = iterate_batches(digits.test_images, digits.test_labels, 50, generator, augment="shift")
        for _ in range(batches_read_before):
            next(batches)
        return generator.get_state()

    assert torch.equal(first_pass(1), first_pass(7))
    runs = [
        collect(digits.test_images, digits.test_labels, size, torch.Generator().manual_seed(5), augment="shift")
        for size in (50, 64)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [150, 150, 60]), (True, [150, 150])])
def test_last_batch(digits, drop_last, sizes):
    batches = iterate_batches(digits.test_images, digits.test_labels, 150, drop_last=drop_last)
    assert [len(y) for _, y, _ in batches] == sizes


def reference_crop(image, padding, row, column, mirrored):
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                r, k = i + row - padding, (width - 1 - j if mirrored else j) + column - padding
                if 0 <= r < height and 0 <= k < width:
                    out[c, i, j] = image[c, r, k]
    return out


def test_crop_flip_is_the_loop_over_images():
    """Non-square images with two channels tell rows, columns and channels apart; the corners of the offsets are in."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 2, 5, 7), dtype=np.uint8)
    shift = np.array([[0, 0], [4, 4], [0, 4], [2, 2], [1, 3], [4, 0]])
    flip = np.array([False, True, True, False, True, False])
    expected = [reference_crop(image, 2, *offset, f) for image, offset, f in zip(images, shift, flip, strict=True)]
    result = crop_flip(torch.from_numpy(images), 2, torch.from_numpy(shift), torch.from_numpy(flip))
    np.testing.assert_array_equal(result.numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("augment", "reach", "mirrors"), [("shift", 1, False), ("crop", 4, False), ("crop_flip", 4, True)]
)
def test_augmentations_reach_every_offset_and_flip_only_where_they_should(augment, reach, mirrors):
    """One bright pixel per image tells its offset; two of different brightness side by side tell a flip."""
    images = torch.zeros(3000, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 8, 8], images[:, :, 8, 9] = 255, 100
    x, _, _ = collect(images, torch.zeros(3000).long(), 1000, torch.Generator().manual_seed(0), augment=augment)
    brightest = x.flatten(1).argmax(1)
    rows, columns = brightest // 16, brightest % 16
    right = x.flatten(1).gather(1, brightest[:, None] + 1).squeeze(1)
    flipped = right == 0
    assert bool(flipped.any()) == mirrors
    if mirrors:
        assert 0.45 < flipped.float().mean().item() < 0.55
    columns = torch.where(flipped, 15 - columns, columns)
    expected = set(range(8 - reach, 8 + reach + 1))
    assert set(rows.tolist()) == expected
    assert set(columns.tolist()) == expected


def test_bad_batch_arguments(digits):
    images, labels = digits.test_images, digits.test_labels
    with pytest.raises(ValueError, match="unknown augmentation 'flip_crop'"):
        iterate_batches(images, labels, 10, augment="flip_crop")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        iterate_batches(images, labels, 0)
    with pytest.raises(ValueError, match="augment='shift' needs a generator"):
        iterate_batches(images, labels, 10, augment="shift")


def of_my_own(root: Path) -> Dataset:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    return Dataset(str(root), images, torch.tensor([0, 1]), images, torch.tensor([0, 1]), 2, 255.0, "none")


def no_folder() -> Dataset:
    return of_my_own(Path("images"))


def test_a_data_set_of_ones_own_is_called_with_the_folder(tmp_path: Path) -> None:
    assert load_dataset(f"{__name__}:of_my_own", tmp_path).name == str(tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'cifar1' .*'cifar10'.*module:function"):
        load_dataset("cifar1")
    with pytest.raises(ValueError, match="data set 'test_data:nothing': module 'test_data' has no 'nothing'"):
        load_dataset("test_data:nothing")
    with pytest.raises(ValueError, match=r"must return a ceat_fast.data.Dataset, got PosixPath"):
        load_dataset("pathlib:Path", tmp_path)
    with pytest.raises(ValueError, match=r"'test_data:no_folder' must be a function that takes \(.*too many pos"):
        load_dataset(f"{__name__}:no_folder", tmp_path)
