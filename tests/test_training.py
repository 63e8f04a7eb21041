"""The trainer: what a step does, resume, run folders, metrics and typed settings."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_training import Tiny, tiny_config, train, without_time
from torch import Tensor, nn

from ceat_fast.data import Dataset, load_dataset
from ceat_fast.ensemble import Ensemble, Execution, Tuned
from ceat_fast.methods import CEAT, EAT, FASTEN, Batch, CalibratedDistance, Method, Standard, StepOutput
from ceat_fast.training import (
    SGD,
    AttackConfig,
    CheckpointConfig,
    DataConfig,
    MultiStep,
    NonFiniteLossError,
    Run,
    TrainConfig,
    Trainer,
    load_config,
)
from ceat_fast.training.checkpoint import checkpoints
from ceat_fast.training.config import config_to_yaml
from ceat_fast.training.metrics import EpochMetrics, histogram
from ceat_fast.training.run import build_ensemble
from ceat_fast.training.seeds import stream_seed
from ceat_fast.training.state import Position


def test_training_learns_and_logs_every_epoch(tmp_path: Path) -> None:
    optimizer = SGD(lr=0.05, grad_clip=1.0)
    trainer = train(tiny_config(tmp_path / "run", epochs=6, optimizer=optimizer, schedule=MultiStep(milestones=[5])))
    records = trainer.run.metrics
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["lr"] for record in records] == pytest.approx([0.05] * 5 + [0.005])
    assert records[-1]["ce"] < 0.8 * records[0]["ce"]
    assert records[-1]["train_nat_accuracy"] > records[0]["train_nat_accuracy"]
    last = records[-1]
    assert sum(last["adv_disparity_histogram"]) == sum(last["nat_disparity_histogram"]) == 96 * 3
    assert last["adv_weight_max"] == pytest.approx(math.exp(5 * last["adv_disparity_max"]), rel=1e-4)
    assert 1 <= last["nat_weight"] <= last["nat_weight_max"] <= math.e
    assert not trainer.ensemble.training


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    first, second = (train(tiny_config(tmp_path / name, epochs=2)) for name in "ab")
    assert without_time(first.run.metrics) == without_time(second.run.metrics)
    third = train(tiny_config(tmp_path / "c", epochs=1, seed=1))
    assert third.run.metrics[0]["loss"] != first.run.metrics[0]["loss"]


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tiny_config(tmp_path / "whole"))
    train(tiny_config(tmp_path / "parts", epochs=1))
    resumed = train(tiny_config(tmp_path / "parts", resume=True))
    assert without_time(resumed.run.metrics) == without_time(whole.run.metrics)
    for name, tensor in whole.ensemble.state_dict().items():
        assert torch.equal(tensor, resumed.ensemble.state_dict()[name]), name


def test_resume_trains_epochs_again_that_no_checkpoint_holds(tmp_path: Path) -> None:
    whole = train(tiny_config(tmp_path / "whole"))

    class Crash(Exception):
        pass

    class CrashingTrainer(Trainer):
        def _save(self) -> None:
            super()._save()
            if self.position.epoch == 2:
                raise Crash

    config = tiny_config(tmp_path / "crashed", checkpoint=CheckpointConfig(every=2))
    crashing = CrashingTrainer(config, console=Console(quiet=True))
    with pytest.raises(Crash):
        crashing.fit()
    crashing.run.add_metrics({"epoch": 3, "loss": 123.0})  # finished, but the crash came before its checkpoint
    resumed = train(dataclasses.replace(config, resume=True))
    assert without_time(resumed.run.metrics) == without_time(whole.run.metrics)
    assert checkpoints(resumed.run.checkpoints)[0].name == "step-000000009"  # the last epoch is saved in any case


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    finished = train(tiny_config(tmp_path / "run", epochs=1))
    again = train(tiny_config(tmp_path / "run", epochs=1, resume=True))
    assert again.run.metrics == finished.run.metrics


def test_a_step_is_one_sgd_step_per_member_on_its_own_loss(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run",
        method=EAT(),
        epochs=1,
        batch_size=96,
        attack=AttackConfig(eps=0.1, alpha=0.05, steps=0, random_start=False),
        data=DataConfig("digits", train_images=96, augment="none"),
        optimizer=SGD(lr=0.1, momentum=0.0, weight_decay=0.0),
        schedule=MultiStep(milestones=[]),
    )
    dataset = load_dataset("digits")
    images, labels = dataset.train_images[:96].float() / 16, dataset.train_labels[:96]
    expected = []
    for member in build_ensemble(config, dataset).members:
        nn.functional.cross_entropy(member.train()(images), labels).backward()
        expected.append(member.fc.weight - 0.1 * member.fc.weight.grad)
    for member, weight in zip(train(config).ensemble.members, expected, strict=True):
        torch.testing.assert_close(member.fc.weight, weight, atol=1e-6, rtol=1e-5)


def test_the_training_attack_leaves_the_running_statistics_alone(tmp_path: Path) -> None:
    """One EAT batch updates BatchNorm once, whatever the number of attack steps."""
    config = tiny_config(tmp_path / "run", method=EAT(), epochs=1, batch_size=96)
    for member in train(config).ensemble.members:
        assert member.norm.num_batches_tracked.item() == 1


def test_gradients_are_clipped_per_member(tmp_path: Path) -> None:
    def change(grad_clip: float | None, name: str) -> list[float]:
        optimizer = SGD(lr=0.1, momentum=0.0, weight_decay=0.0, grad_clip=grad_clip)
        config = tiny_config(tmp_path / name, epochs=1, batch_size=96, optimizer=optimizer)
        before = build_ensemble(config, load_dataset("digits"))
        pairs = zip(train(config).ensemble.members, before.members, strict=True)
        return [
            math.sqrt(sum((a - b).square().sum().item() for a, b in zip(x.parameters(), y.parameters(), strict=True)))
            for x, y in pairs
        ]

    assert min(change(None, "free")) > 0.1 * 0.05
    assert change(0.05, "clipped") == pytest.approx([0.1 * 0.05] * 3, rel=1e-4)


def test_members_start_from_streams_of_their_own() -> None:
    config = tiny_config(Path("unused"))
    dataset = load_dataset("digits")
    state = torch.random.get_rng_state()
    a, b, _c = build_ensemble(config, dataset).members
    assert not torch.equal(a.fc.weight, b.fc.weight)
    pair = build_ensemble(dataclasses.replace(config, models=config.models[:2]), dataset)
    assert torch.equal(pair.members[1].fc.weight, b.fc.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert stream_seed(0, "data", 1) != stream_seed(0, "attack", 1) != stream_seed(1, "attack", 1)


def test_the_attack_draws_other_noise_in_every_epoch(tmp_path: Path) -> None:
    stepper = Trainer(tiny_config(tmp_path / "run"), console=Console(quiet=True)).stepper
    seeds = [stepper._attack(step)[0].seed for step in range(9)]  # three epochs of three steps
    assert [seeds.count(seed) for seed in seeds] == [3] * 9


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"--resume true.*--out"):
        Trainer(tiny_config(folder))
    with pytest.raises(FileExistsError, match="no run"):
        Trainer(tiny_config(folder, resume=True))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", epochs=1))
    changed = tiny_config(
        tmp_path / "run", resume=True, batch_size=48, attack=AttackConfig(eps=0.2, alpha=0.05, steps=2)
    )
    with pytest.raises(ValueError, match=r"other settings.*: attack\.eps, batch_size;"):
        Trainer(changed)


def test_data_that_moved_can_be_resumed_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", epochs=1)
    train(config)
    moved = dataclasses.replace(config, epochs=2, resume=True, data=dataclasses.replace(config.data, root="elsewhere"))
    assert len(train(moved).run.metrics) == 2


def test_slow_batches_are_read_more_often(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path / "run"), console=Console(quiet=True))
    for seconds, every in ((0.01, 20), (1.0, 5), (60.0, 1)):
        trainer.position = Position(0, 2, 2 * seconds)
        assert trainer._agree(15) == 15
        assert trainer._read_every == every


class Exploding(EAT):
    """EAT whose member 1 has an infinite loss in the second batch."""

    calls = 0

    def step(self, *arguments: Any) -> StepOutput:
        self.calls += 1
        output = super().step(*arguments)
        factor = torch.ones_like(output.losses)
        factor[1] = math.inf if self.calls == 2 else 1.0
        return output._replace(losses=output.losses * factor)


def test_a_non_finite_loss_stops_the_run_and_names_the_place(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", method=Exploding(), batch_size=96, epochs=1))
    kept = tmp_path / "run" / "checkpoints" / "step-000000001"
    config = tiny_config(tmp_path / "run", method=Exploding(), batch_size=96, epochs=3, resume=True)
    config.method.calls = 1  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLossError, match=f"loss inf in epoch 2, batch 1, member 1; .*max_weight.*{kept}"):
        train(config)
    assert kept.is_dir()
    assert [record["epoch"] for record in Run.open(tmp_path / "run").metrics] == [1]


def test_labels_out_of_range_are_named_before_training(tmp_path: Path) -> None:
    digits = load_dataset("digits")
    labels = digits.train_labels.clone()
    labels[7] = 10
    dataset = dataclasses.replace(digits, train_labels=labels)
    with pytest.raises(ValueError, match=r"label 10 of training image 7 is outside \[0, 10\)"):
        Trainer(tiny_config(tmp_path / "run"), dataset=dataset)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": lambda labels: labels.float()}, r"labels must be int64 \(N,\), got torch.float32 \(\d+,\)"),
        ({"labels": lambda labels: labels.int()}, r"labels must be int64 \(N,\), got torch.int32"),
        ({"labels": lambda labels: labels[:, None]}, r"labels must be int64 \(N,\), got torch.int64 \(\d+, 1\)"),
        ({"labels": lambda labels: labels - 1}, r"label -1 of (training|test) image \d+ is outside \[0, 10\)"),
        ({"labels": lambda labels: labels[1:]}, r"(training|test) images, \d+ labels"),
        ({"images": lambda images: images.float()}, r"(training|test) images must be uint8 \(N, C, H, W\), got"),
        ({"images": lambda images: images * 15}, r"scale=16 must be the value that means 1.0, and .* images reach 240"),
    ],
    ids=["float", "int32", "column", "range", "count", "images", "scale"],
)
def test_data_that_do_not_fit_are_refused_before_training(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    digits = load_dataset("digits")
    ((kind, change),) = changes.items()
    name = f"{part}_{kind}"
    dataset = dataclasses.replace(digits, **{name: change(getattr(digits, name))})
    config = tiny_config(tmp_path / "run", data=DataConfig("digits"))
    with pytest.raises(ValueError, match="data set 'digits': .*" + message):
        Trainer(config, dataset=dataset)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": FASTEN(), "models": ["tiny_training:tiny"]}, "FASTEN needs at least 2 members, got 1"),
        ({"method": CEAT(impl="native")}, "method.impl='native' cannot run on 'cpu': not built"),
        (
            {"method": EAT(plus_ceat=CalibratedDistance(impl="native"))},
            "method.plus_ceat.impl='native' cannot run on 'cpu': not built",
        ),
    ],
)
def test_methods_that_cannot_run_are_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ceat_fast.ops.dispatch.missing", lambda impl, device: "not built")
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


class Normalised(nn.Sequential):
    """BatchNorm over vectors: one image has no variance."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))


def test_a_last_batch_of_one_image_is_refused_where_the_members_cannot_train_on_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", data=DataConfig("digits", train_images=81), epochs=1)
    members = Ensemble([Tiny(), Normalised()], backend="loop")
    message = "batch_size=40 cuts 81 training images into batches of which the last has 1, and member 1 cannot train on"
    with pytest.raises(ValueError, match=message + r" one image \(Expected more than 1 value"):
        Trainer(config, ensemble=members)
    assert not (tmp_path / "run").exists()
    trainer = Trainer(config, ensemble=Ensemble([Tiny(dropout=0.5)], backend="loop"))
    assert trainer.ensemble.members[0].norm.num_batches_tracked.item() == 0
    assert not trainer.ensemble.training
    trainer.fit()
    two = dataclasses.replace(config, out=str(tmp_path / "two"), data=DataConfig("digits", train_images=82))
    train(two, ensemble=members)


def test_own_data_and_members(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(20) % 10
    dataset = Dataset("mine", images, labels, images, labels, 10, 255.0, "none")
    members = Ensemble([Tiny(), Tiny()], backend="loop", average="logit")
    trainer = train(tiny_config(tmp_path / "run", epochs=1), dataset=dataset, ensemble=members)
    assert trainer.ensemble is members
    assert len(trainer.run.metrics[0]["loss_members"]) == 2


def test_metrics_are_means_over_samples_of_unequal_batches() -> None:
    metrics = EpochMetrics(lambda logits: logits.softmax(-1).mean(0))
    right, wrong = [5.0, 0.0], [0.0, 9.0]
    for ce, logits in (([[1.0, 2.0]], [[right, wrong]]), ([[7.0]], [[right]]), ([[2.0]], [[right]])):
        part = torch.tensor(ce)
        output = StepOutput(part.mean(1), {"ce": part, "adv_disparity": part / 7}, torch.tensor(logits), None)
        metrics.update(output, torch.zeros(part.shape[1], dtype=torch.int64))
    result = metrics.result()
    assert result["loss"] == pytest.approx(3.0)
    assert result["ce"] == pytest.approx(3.0)
    assert result["train_adv_accuracy"] == pytest.approx(3 / 4)
    assert result["adv_disparity_max"] == pytest.approx(1.0)
    assert "train_nat_accuracy" not in result
    json.dumps(result, allow_nan=False)


def test_histogram_bins() -> None:
    counts = histogram(torch.tensor([[0.0, 0.24, 0.25], [0.99, 1.0, 3.0]]), bins=4)
    assert counts.tolist() == [2, 1, 0, 3]


def test_a_config_survives_its_yaml(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run", method=CEAT(lam=5.0, mu=1.0, max_weight=20.0), attack=AttackConfig(eps="8/255", alpha="2/255")
    )
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(path)
    assert len(config.models) == (4 if "four" in path.stem else 3)
    assert config.out == f"runs/{path.stem}"
    assert config.data.name == path.stem.split("_")[0]
    assert ("mixed" in path.stem) == (len(set(config.models)) == 3)
    if isinstance(config.method, CEAT):
        assert path.stem == "digits_ceat" or path.stem.endswith(f"ceat_{config.method.lam:g}_{config.method.mu:g}")
    else:
        assert type(config.method) is EAT
        assert path.stem.endswith("eat")
    assert config.schedule.factor(config.epochs * 10 - 1, 10, config.epochs) == pytest.approx(0.01)


def test_there_is_a_preset_for_every_training_of_the_paper() -> None:
    methods = ("ceat_5_1", "ceat_1_5", "eat")
    sets = ("cifar10", "cifar100", "cifar10_mixed", "cifar10_four", "svhn")
    found = {path.stem for path in Path(__file__).parents[1].glob("configs/*.yaml")}
    assert found == {f"{name}_{method}" for name in sets for method in methods} | {"digits_ceat", "digits_eat"}


def test_the_paper_preset_is_the_paper(request: pytest.FixtureRequest) -> None:
    config = load_config(request.config.rootpath / "configs" / "cifar10_ceat_1_5.yaml")
    assert config == TrainConfig(out="runs/cifar10_ceat_1_5")
    assert config.method == CEAT(lam=1.0, mu=5.0)
    assert (config.models, config.epochs, config.batch_size) == (["resnet20"] * 3, 120, 128)
    assert (config.attack.eps, config.attack.alpha, config.attack.steps) == (0.031, 0.007, 10)
    assert (config.optimizer, config.schedule) == (SGD(0.01, 1e-4, None, 0.9, False), MultiStep(0, [75, 95], 0.1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "did you mean 'epochs'"),
        ("epochs: many", "epochs"),
        ("epochs: 0", "epochs must be positive"),
        ("attack: {qqq: 1}", "allowed: attack.alpha, attack.eps,"),
        ("optimizer: {lt: 0.1}", "did you mean 'optimizer.lr'"),
        ("validation: {attack: {epss: 0.1}}", "did you mean 'validation.attack.eps'"),
        (
            "schedule: Cosin",
            r"unknown schedule 'Cosin' \(did you mean 'Cosine'\?\); allowed: MultiStep, Cosine, OneCycle",
        ),
        ("backend: vmpa", "unknown backend 'vmpa' .*'vmap'"),
        ("eps_warmup_epochs: 121", "eps_warmup_epochs must be at most epochs=120, got 121"),
        ("schedule: {warmup_epochs: 121}", "schedule.warmup_epochs must be at most epochs=120, got 121"),
        ("average: {class_path: SWA, init_args: {start_epoch: 121}}", "average.start_epoch must be at most epochs=120"),
        ("watch: {overfitting: stop}", "watch.overfitting='stop' needs held-out images: set validation.images"),
        ("optimizer: {lr: -1}", "optimizer.lr must be positive"),
        ("optimizer: {momentum: 1.0}", r"optimizer.momentum must be in \[0, 1\)"),
        ("schedule: {milestones: [9, 5]}", "schedule.milestones must be epochs above 0 in rising order"),
        ("optimizer: {grad_clip: 0}", "optimizer.grad_clip must be positive"),
        ("attack: {eps: 8/0}", r": attack\.eps must be a number or a fraction"),
        ("evaluation: {steps: -1}", r": evaluation\.steps must be at least 0"),
        ("validation: {attack: {eps: foo}}", r": validation\.attack\.eps must be a number or a fraction"),
        ("validation: {attack: {restarts: 2, random_start: false}}", r"validation\.attack\.restarts=2 without random"),
        ("evaluation: {precision: f}", "evaluation: unknown precision 'f'"),
        ("attack: {eps: null}", r"attack\.eps must have a value, got null"),
        ("validation: {attack: {steps: null}}", r"validation\.attack\.steps"),
        ("attack: null", "attack must have a value, got null"),
        ("epochs: null", "epochs must have a value, got null"),
        ("method: null", "method must have a value, got null"),
        ("method: {class_path: CEAT, init_args: {lam: null}}", r"method\.lam must have a value, got null"),
        ("optimizer: {lr: null}", r"optimizer\.lr must have a value, got null"),
        ("data: {name: cifar}", "did you mean 'cifar10'"),
        ("data: {train_images: 0}", "data.train_images must be positive"),
        ("models: []", "models must be one name per member"),
        ("method: {class_path: CEAT, init_args: {mu: -5}}", "mu must be finite and at least 0"),
        ("seed: -1", "seed must be in"),
    ],
)
def test_wrong_settings_are_refused_with_the_file_and_the_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [EAT(label_smoothing=0.3), Standard(label_smoothing=0.3), CEAT(label_smoothing=0.3, impl="torch")],
    ids=lambda method: type(method).__name__,
)
def test_label_smoothing_is_that_of_torch(method: Method) -> None:
    torch.manual_seed(0)
    ensemble = Ensemble([Tiny(), Tiny(), Tiny()], backend="loop").eval()
    batch = Batch(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 9]), torch.arange(5))
    adversarial = batch.images if type(method) is Standard else torch.rand(5, 1, 8, 8)
    hard = dataclasses.replace(method, label_smoothing=0.0).step(ensemble, adversarial, batch).losses
    soft = method.step(ensemble, adversarial, batch).losses
    for m, member in enumerate(ensemble.members):
        logits = member(adversarial)
        ce, smooth = (nn.functional.cross_entropy(logits, batch.labels, label_smoothing=s) for s in (0.0, 0.3))
        torch.testing.assert_close(soft[m] - hard[m], smooth - ce, rtol=1e-4, atol=1e-5)
    assert (soft != hard).all()


@pytest.mark.parametrize("name", ["SCORE", "MART", "GAL"])
def test_methods_without_a_cross_entropy_of_their_own_refuse_label_smoothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"method: {{class_path: {name}, init_args: {{label_smoothing: 0.1}}}}")
    with pytest.raises(ValueError, match="'label_smoothing' is not accepted"):
        load_config(path)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
        EAT(label_smoothing=1.5)


def test_a_long_run_measures_its_execution_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    choice = Tuned(attack=Execution("vmap"), training=Execution("loop"))

    def tune(ensemble: Ensemble, x: Tensor, **settings: Any) -> Tuned:
        calls.append((tuple(x.shape), settings["passes"], settings["updates"]))
        return choice

    monkeypatch.setattr("ceat_fast.training.trainer.tune", tune)
    short = train(tiny_config(tmp_path / "short", backend="auto"))
    assert calls == []
    assert short.ensemble.tuned is None
    # 96 images in batches of 40 are 3 steps, each of 2 attack steps and 2 passes.
    monkeypatch.setattr("ceat_fast.training.trainer.MEASURE_FROM_PASSES", 3 * 3 * 4)
    config = tiny_config(tmp_path / "long", backend="auto")
    assert train(config).ensemble.tuned == choice
    assert calls == [((40, 1, 8, 8), 18, 18)]
    resumed = Trainer(dataclasses.replace(config, epochs=4, resume=True), console=Console(quiet=True))
    assert resumed.ensemble.tuned == choice
    resumed.fit()
    assert len(calls) == 1


def test_an_ensemble_from_python_is_read_back_as_it_was(tmp_path: Path) -> None:
    """Its average too, which no setting has; members that the settings do not name are refused by name."""
    dataset = load_dataset("digits")
    config = tiny_config(tmp_path / "run", epochs=1)
    ensemble = Ensemble([Tiny() for _ in range(3)], average="logit")
    trainer = Trainer(config, ensemble=ensemble, console=Console(quiet=True))
    trainer.fit()
    x = dataset.test_images[:4].float() / dataset.scale
    torch.testing.assert_close(trainer.run.load_ensemble(dataset)(x), trainer.ensemble(x))

    linear = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)])
    config = dataclasses.replace(config, out=str(tmp_path / "other"))
    trainer = Trainer(config, ensemble=linear, console=Console(quiet=True))
    trainer.fit()
    with pytest.raises(ValueError, match=r"holds other members than models=\['tiny_training:tiny'"):
        trainer.run.load_ensemble(dataset)
