"""Image data sets held in memory as uint8, and their batches."""

from __future__ import annotations

from ceat_fast.data.batches import AUGMENTATIONS, iterate_batches
from ceat_fast.data.datasets import DATASETS, Dataset, data_folder, load_dataset, require_dataset_name

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Dataset",
    "data_folder",
    "iterate_batches",
    "load_dataset",
    "require_dataset_name",
]
