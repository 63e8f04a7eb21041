"""Models that were not written for this package: torchvision's ResNet-18, and a transformer without BatchNorm."""

from __future__ import annotations

import importlib
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_training import train
from torch import Tensor, nn

from ceat_fast.data import Dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import evaluate_run
from ceat_fast.evaluation.protocol import EvaluationConfig
from ceat_fast.methods import CEAT
from ceat_fast.training import Adam, AttackConfig, DataConfig, MultiStep, Run, TrainConfig
from ceat_fast.training.checkpoint import checkpoints, load_weights

torchvision = pytest.importorskip("torchvision")
EXAMPLES = Path(__file__).parents[1] / "examples"


class Transformer(nn.Module):
    """Patches, self-attention, LayerNorm."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.position = nn.Parameter(torch.zeros(16, width))
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.encoder(tokens)).mean(1))


@pytest.fixture
def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(16) % 4
    return Dataset("noise", images, labels, images, labels, 4, 255.0, "crop_flip")


def test_a_resnet_18_and_a_transformer_train_together(images: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ensemble = Ensemble([torchvision.models.resnet18(num_classes=4), Transformer(4), Transformer(4)])
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    config = TrainConfig(
        out=str(tmp_path / "run"),
        method=CEAT(impl="torch"),
        models=["resnet18", "transformer", "transformer"],
        data=DataConfig("digits"),
        attack=AttackConfig(eps="4/255", alpha="2/255", steps=2),
        optimizer=Adam(lr=1e-3),
        schedule=MultiStep(milestones=[]),
        epochs=1,
        batch_size=8,
        device="cpu",
    )
    run = train(config, dataset=images, ensemble=ensemble).run
    (record,) = run.metrics
    assert all(math.isfinite(loss) for loss in record["loss_members"])
    after = load_weights(checkpoints(run.checkpoints)[0])
    assert after.keys() == before.keys()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    trained = {name for name, _ in ensemble.named_parameters()}
    assert trained <= moved
    assert after["members.0.bn1.num_batches_tracked"].item() == 4  # two steps of two passes; the attack is not counted


def test_the_example_of_an_image_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 55), ("test", 4)):
        for shade, name in ((60, "dark"), (200, "light")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(-40, 40, (20, 18, 3), generator=generator)
                image = Image.fromarray((shade + noise).to(torch.uint8).numpy())
                image.save(tmp_path / "images" / split / name / f"{number}.png")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("image_folder")
    monkeypatch.setattr(example, "SIZE", 16)
    quick = EvaluationConfig(attacks=["PGD"], sanity_samples=0)
    monkeypatch.setattr(example, "evaluate_run", partial(evaluate_run, config=quick))
    example.main(str(tmp_path / "images"), str(tmp_path / "run"), epochs=1)
    assert "PGD-7" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert checkpoints(tmp_path / "run" / "checkpoints", "best")
    (record,) = Run.open(tmp_path / "run").metrics
    assert len(record["loss_members"]) == 3
