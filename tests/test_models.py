"""Architecture facts of the models, and the registry."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import nn

from ceat_fast.data import load_dataset
from ceat_fast.models import build_model, digits_resnet, resnet20, resnet26, resnet32
from ceat_fast.models.resnet import BasicBlock, Normalize, ResNet


@pytest.mark.parametrize(
    ("build", "classes", "expected"),
    [(resnet20, 10, 272_474), (resnet26, 10, 369_690), (resnet32, 10, 466_906), (resnet20, 100, 278_324)],
)
def test_parameter_count_is_the_published_one(build, classes, expected):
    assert sum(p.numel() for p in build(classes).parameters()) == expected


@pytest.mark.parametrize(("build", "layers"), [(resnet20, 20), (resnet26, 26), (resnet32, 32)])
def test_depth_counts_3x3_convolutions_and_the_head(build, layers):
    model = build()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == layers


def test_shortcuts_project_only_where_the_width_changes():
    blocks = [m for m in resnet20().modules() if isinstance(m, BasicBlock)]
    projected = [i for i, block in enumerate(blocks) if not isinstance(block.shortcut, nn.Identity)]
    assert projected == [3, 6]
    assert [(b.shortcut[0].kernel_size, b.shortcut[0].stride) for b in (blocks[3], blocks[6])] == [((1, 1), (2, 2))] * 2


def test_convolutions_start_normal_with_variance_two_over_fan_out():
    torch.manual_seed(0)
    weight = resnet20().stages[2][1].conv1.weight  # 64 x 64 x 3 x 3
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert abs(weight.mean().item()) < 0.001


def test_normalisation_is_inside_the_model():
    torch.manual_seed(0)
    model = resnet20().eval()
    x = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    std = torch.tensor([0.2023, 0.1994, 0.2010])[:, None, None]
    expected = model(x)
    model.normalize = nn.Identity()
    torch.testing.assert_close(model((x - mean) / std), expected)


def test_statistics_are_buffers_and_follow_the_channels():
    assert {"normalize.mean", "normalize.std"} <= resnet20().state_dict().keys()
    assert resnet20(in_channels=1).normalize.mean.flatten().tolist() == [0.5]
    custom = resnet20(in_channels=2, normalize=((0.1, 0.2), (0.3, 0.4)))
    assert custom.normalize.std.flatten().tolist() == pytest.approx([0.3, 0.4])


def test_the_digits_network_normalises_by_the_statistics_of_the_digits() -> None:
    digits = load_dataset("digits")
    pixels = digits.train_images / digits.scale
    own = digits_resnet().normalize
    assert (own.mean.item(), own.std.item()) == pytest.approx((pixels.mean().item(), pixels.std().item()), abs=1e-3)
    assert digits_resnet(in_channels=3).normalize.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("size", [(32, 32), (28, 40), (64, 64)])
def test_any_image_size(size):
    torch.manual_seed(0)
    x = torch.rand(2, 3, *size, requires_grad=True)
    logits = resnet20(7).eval()(x)
    assert logits.shape == (2, 7)
    logits[:, 0].sum().backward()
    assert (x.grad != 0).any(1).all()  # at every pixel


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        resnet20(1)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        resnet20(in_channels=0)
    with pytest.raises(ValueError, match="2 channel means for in_channels=3"):
        resnet20(normalize=((0.1, 0.2), (1.0, 1.0)))
    with pytest.raises(ValueError, match="std > 0"):
        Normalize([0.0], [0.0])


def test_build_model_by_name():
    model = build_model("resnet26", num_classes=5)
    assert isinstance(model, ResNet)
    assert model.fc.out_features == 5
    assert build_model("digits_resnet", 10, in_channels=1).conv1.in_channels == 1


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'resnet_20' \(did you mean 'resnet20'\?\).*module:function"):
        build_model("resnet_20", 10)


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("my_models")
    module.mlp = lambda num_classes, in_channels: nn.Sequential(nn.Flatten(), nn.Linear(in_channels, num_classes))
    module.text = "resnet20"
    module.broken = lambda num_classes, in_channels: "no module"
    module.fixed = lambda in_channels: nn.Linear(in_channels, 10)
    monkeypatch.setitem(sys.modules, "my_models", module)


@pytest.mark.usefixtures("user_module")
def test_build_model_from_a_users_function():
    model = build_model("my_models:mlp", num_classes=4, in_channels=6)
    assert model(torch.rand(2, 6)).shape == (2, 4)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module:f", "no module named 'no_such_module'"),
        ("my_models:nothing", "has no 'nothing'"),
        ("my_models:text", "not callable"),
        ("my_models:broken", "must return an nn.Module, got str"),
        ("my_models:fixed", r"must be a function that takes \(num_classes=10, in_channels=3\): .*'num_classes'"),
    ],
)
def test_a_users_function_that_does_not_fit(name, text):
    with pytest.raises(ValueError, match=text):
        build_model(name, 10)


def test_a_broken_import_inside_a_users_module_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "user_models_broken.py").write_text("import a_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_missing_dependency"):
        build_model("user_models_broken:net", 10)
