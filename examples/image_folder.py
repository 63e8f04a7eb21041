"""Models and images of your own: three of torchvision's ResNet-18 on a folder of images.

    python examples/image_folder.py IMAGES --out runs/mine

IMAGES/train/CLASS/*.png and IMAGES/test/CLASS/*.png, with any names of classes and any image format. The same by the
command line, from the folder of this file:

    ceat-fast train --models '[image_folder:member, image_folder:member, image_folder:member]' \\
        --data.name image_folder:images --data.root IMAGES --attack.eps 4/255 --out runs/mine
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from ceat_fast.data import Dataset
from ceat_fast.evaluation import evaluate_run
from ceat_fast.models.resnet import Normalize
from ceat_fast.reports import score_table
from ceat_fast.training import SGD, AttackConfig, Cosine, DataConfig, TrainConfig, Trainer, ValidationConfig

SIZE = 64  # images are resized and cropped to so many pixels on a side


def member(num_classes: int, in_channels: int) -> nn.Module:
    """A model maps images in [0, 1] to logits; what it normalises by is its first layer."""
    return nn.Sequential(Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), resnet18(num_classes=num_classes))


def images(root: Path) -> Dataset:
    """The whole data set in memory as uint8."""

    def split(name: str) -> tuple[Tensor, Tensor]:
        source = ImageFolder(root / name)
        tensors = [center_crop(resize(pil_to_tensor(image), [SIZE]), [SIZE]) for image, _ in source]
        return torch.stack(tensors), torch.tensor(source.targets)

    classes = len(ImageFolder(root / "train").classes)
    return Dataset(root.name, *split("train"), *split("test"), classes, scale=255.0, augment="crop_flip")


def main(
    folder: str, out: str = "runs/image_folder", eps: str = "4/255", epochs: int = 30, resume: bool = False
) -> None:
    """Train three ResNet-18 with CEAT (1, 5) and judge them.

    Args:
        folder: has the folders train and test, and in each one folder per class.
        out: run folder.
        eps: radius of the attack.
        epochs: passes over the training images.
        resume: continue the run in `out`.
    """
    attack = AttackConfig(eps=eps, alpha="1/255", steps=7)
    config = TrainConfig(
        out=out,
        models=["image_folder:member"] * 3,
        data=DataConfig("image_folder:images", root=folder),
        attack=attack,
        evaluation=attack,
        optimizer=SGD(lr=0.05, weight_decay=5e-4, grad_clip=1.0),
        schedule=Cosine(warmup_epochs=1),
        validation=ValidationConfig(images=100, attack=attack),
        epochs=epochs,
        resume=resume,
    )
    trainer = Trainer(config)
    trainer.fit()
    Console().print(score_table({config.method.label: evaluate_run(trainer.run)}))


if __name__ == "__main__":
    auto_cli(main)
