"""The sanity report: every flag is raised by a model that deserves it, and none by an honest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble
from ceat_fast.evaluation import CLEAN, Check, EvaluationResult, Score, evaluate
from ceat_fast.evaluation.probes import Probe
from ceat_fast.evaluation.sanity import check_scores, curve

ATTACK = {"PGD": PGD(eps=0.1, alpha=0.025, steps=10, seed=0)}
PROBES = [
    "deterministic",
    "independent of the batch",
    "logits",
    "zero gradients",
    "unbounded attack",
    "single step",
    "more steps",
    "random noise",
    "transfer from members",
]


def data(samples: int = 48) -> tuple[Tensor, Tensor]:
    x = torch.rand(samples, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, 2 * (x[:, 0, :2].mean((1, 2)) > 0.5).long() + (x[:, 0, 2:].mean((1, 2)) > 0.5).long()


def trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    x, y = data(256)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def honest() -> nn.Module:
    return trained(0)


class Changed(nn.Module):
    """A model whose output something was done to."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


class Rounded(nn.Module):
    """Steps in front of the model: no gradient passes them, noise does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 40).round() / 40)


class Misleading(torch.autograd.Function):
    """The identity, whose gradient points the wrong way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Reversed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(Misleading.apply(x))


def probed(model: nn.Module, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in evaluate(model.eval(), *data(), ATTACK, **options).checks}


def flagged(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.outcome == "flag"}


def test_an_honest_model_raises_no_flag(honest: nn.Module) -> None:
    checks = probed(honest)
    assert flagged(checks) == set()
    assert [name for name in checks if name in PROBES] == PROBES
    assert checks["transfer from members"].outcome == "not run"
    assert checks["unbounded attack"].finding == "eps 1, 50 steps leave model an accuracy of 0.0%"


def test_an_honest_ensemble_raises_no_flag(honest: nn.Module) -> None:
    checks = probed(Ensemble([honest, trained(1), trained(2)]))
    assert flagged(checks) == set()
    assert checks["transfer from members"].outcome == "ok"


def test_a_compiled_model_raises_no_flag(honest: nn.Module) -> None:
    assert flagged(probed(torch.compile(honest, backend="eager"))) == set()


def test_a_random_model(honest: nn.Module) -> None:
    model = Changed(honest, lambda z: z + 0.1 * torch.randn_like(z))
    checks = probed(model)
    assert "deterministic" in flagged(checks)
    assert "randomised" in checks["deterministic"].advice


def test_samples_that_influence_each_other(honest: nn.Module) -> None:
    assert "independent of the batch" in flagged(probed(Changed(honest, lambda z: z - z.mean(0))))


def test_probabilities_instead_of_logits(honest: nn.Module) -> None:
    checks = probed(Changed(honest, lambda z: z.softmax(-1)))
    assert "logits" in flagged(checks)
    assert checks["logits"].finding.startswith("model: outputs lie in [0, 1]")
    assert "logits" not in flagged(probed(Changed(honest, lambda z: z.log_softmax(-1))))


def test_a_saturated_cross_entropy(honest: nn.Module) -> None:
    checks = probed(Changed(honest, lambda z: 1e4 * z))
    assert "zero gradients" in flagged(checks)


def test_the_guilty_member_is_named(honest: nn.Module) -> None:
    ensemble = Ensemble([trained(1), Changed(honest, lambda z: 1e4 * z)])
    finding = probed(ensemble)["zero gradients"].finding
    assert "that member 1 gets right have a gradient of exactly zero" in finding
    assert "logits" not in flagged(probed(ensemble, members=False))


def test_no_gradient_at_all(honest: nn.Module) -> None:
    names = flagged(probed(Rounded(honest)))
    assert {"zero gradients", "unbounded attack", "random noise"} <= names


def test_gradients_that_mislead(honest: nn.Module) -> None:
    names = flagged(probed(Reversed(honest)))
    assert {"unbounded attack", "random noise", "attacks make progress"} <= names


def test_an_attack_that_hardly_moves_is_beaten_by_noise_and_by_a_single_step() -> None:
    """One draw of noise misleads half of the samples, twenty together all of them."""
    x = torch.full((40, 1, 1, 1), 0.5)
    model = Changed(nn.Flatten(), lambda z: torch.cat([0 * z, 100 * (z - 0.501)], 1)).eval()
    weak = PGD(eps=0.1, alpha=1e-6, steps=1, random_start=False, seed=0)
    probe = Probe(model, x, torch.zeros(40, dtype=torch.int64), torch.arange(40), weak)
    for check in (probe.random_noise(), probe.single_step()):
        assert check.outcome == "flag"
        assert " 0.0%" in check.finding


def test_members_that_betray_a_masked_ensemble(honest: nn.Module) -> None:
    class Masked(Ensemble):
        def combine(self, logits: Tensor) -> Tensor:
            return super().combine(Misleading.apply(logits))

    ensemble = Masked([honest, trained(1)], average="logit").eval()
    assert "transfer from members" in flagged(probed(ensemble))


def test_probes_can_be_left_out(honest: nn.Module) -> None:
    assert not set(PROBES) & set(probed(honest, sanity_samples=0))


def result(
    columns: dict[str, tuple[dict[str, Any], float]], classes: int = 10, samples: int = 1000
) -> EvaluationResult:
    """Scores of one model with the accuracies given."""
    scores, attacks = [], {}
    for name, (settings, accuracy) in {CLEAN: ({}, 0.9), **columns}.items():
        correct = torch.arange(samples) < round(accuracy * samples)
        margin = torch.where(correct, 1.0, -1.0)
        scores.append(Score("model", name, correct, torch.zeros(samples).long(), margin, torch.zeros(samples)))
        attacks[name] = {"settings": settings, "seconds": 1.0, "passes": None}
    return EvaluationResult(scores, attacks, torch.zeros(samples).long(), about={"classes": classes})


def outcome(name: str, columns: dict[str, tuple[dict[str, Any], float]], **options: Any) -> Check:
    return {check.name: check for check in check_scores(result(columns, **options))}[name]


def pgd(eps: float, steps: int = 20) -> dict[str, Any]:
    return {
        "attack": "PGD",
        "eps": eps,
        "eps_as_given": str(eps),
        "eps_255": eps * 255,
        "alpha": eps / 4,
        "steps": steps,
    }


SQUARE = {"attack": "Square", "eps": 0.03, "norm": "Linf"}
AUTO = {"attack": "AutoAttack", "eps": 0.03, "norm": "Linf"}


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("more steps, all samples", {"a": (pgd(0.03, 20), 0.5), "b": (pgd(0.03, 100), 0.49)}, "ok"),
        ("more steps, all samples", {"a": (pgd(0.03, 20), 0.5), "b": (pgd(0.03, 100), 0.505)}, "ok"),
        ("more steps, all samples", {"b": (pgd(0.03, 100), 0.52), "a": (pgd(0.03, 20), 0.5)}, "flag"),
        ("more steps, all samples", {"a": (pgd(0.03), 0.5), "b": (pgd(0.05), 0.6)}, "not run"),
        ("larger eps", {"a": (pgd(0.03), 0.5), "b": (pgd(0.05), 0.3)}, "ok"),
        ("larger eps", {"a": (pgd(0.03), 0.5), "b": (pgd(0.05), 0.52)}, "flag"),
        ("Square not stronger than white-box", {"a": (pgd(0.03), 0.5), "s": (SQUARE, 0.52)}, "ok"),
        ("Square not stronger than white-box", {"a": (pgd(0.03), 0.5), "s": (SQUARE, 0.497)}, "flag"),
        ("Square not stronger than white-box", {"a": (pgd(0.05), 0.5), "s": (SQUARE, 0.4)}, "not run"),
        ("Square within AutoAttack", {"a": (pgd(0.03), 0.5), "s": (SQUARE, 0.4)}, "not run"),
        ("PGD to AutoAttack", {"a": (pgd(0.03), 0.5), "aa": (AUTO, 0.42)}, "ok"),
        ("PGD to AutoAttack", {"a": (pgd(0.03), 0.5), "aa": (AUTO, 0.39)}, "flag"),
        ("PGD to AutoAttack", {"a": (pgd(0.03), 0.5), "aa": (AUTO, 0.52)}, "flag"),
        ("PGD to AutoAttack", {"a": (pgd(0.05), 0.5), "aa": (AUTO, 0.3)}, "not run"),
        ("enough classes", {"aa": (AUTO, 0.5)}, "ok"),
        ("enough classes", {"a": (pgd(0.03), 0.5)}, "not run"),
        ("searched in fp32", {"a": (pgd(0.03), 0.5)}, "ok"),
        ("searched in fp32", {"a": (pgd(0.03) | {"precision": "bf16"}, 0.5)}, "flag"),
        ("attacks make progress", {"a": (pgd(0.03), 0.9)}, "ok"),
        ("attacks make progress", {"a": (pgd(0.03), 0.96)}, "flag"),
    ],
)
def test_checks_of_the_scores(name: str, columns: dict[str, Any], expected: str) -> None:
    check = outcome(name, columns)
    assert check.outcome == expected
    assert bool(check.advice) == (expected == "flag")


def test_the_finding_quotes_the_accuracies() -> None:
    check = outcome("PGD to AutoAttack", {"PGD-20": (pgd(0.03), 0.5), "AA": (AUTO, 0.31)})
    assert check.finding == "model: PGD-20 leaves 50.0%, AA leaves 31.0%"


def test_few_classes_weaken_autoattack() -> None:
    assert outcome("enough classes", {"aa": (AUTO, 0.5)}, classes=9).outcome == "flag"


def test_tf32_is_flagged() -> None:
    found = result({"a": (pgd(0.03), 0.5)})
    found.about["arithmetic"] = "TF32"
    (check,) = [check for check in check_scores(found) if check.name == "searched in fp32"]
    assert (check.outcome, check.finding) == ("flag", "convolutions were rounded to TF32")


@pytest.mark.parametrize(("found", "expected"), [(1, "ok"), (2, "ok"), (3, "flag")])
def test_square_within_autoattack(found: int, expected: str) -> None:
    evaluated = result({"AA": (AUTO, 0.5)})  # of 1,000 samples, 0.2 % are 2
    evaluated.attacks["AA"]["found_by"] = {"model": {"clean": 100, "apgd-ce": 300, "square": found}}
    evaluated.attacks["AA"]["flags"] = ["square lowers the robust accuracy by 1.00% after other attacks", "odd 3 of 4"]
    evaluated.attacks["AA"]["flags"].append("odd 5 of 6")
    checks = {check.name: check for check in check_scores(evaluated)}
    assert checks["Square within AutoAttack"].outcome == expected
    assert [check.finding for name, check in checks.items() if name == "remark of AA"] == ["odd 3 of 4"]


@pytest.mark.parametrize(("by_square", "expected"), [(0, "ok"), (2, "ok"), (3, "flag")])
def test_what_square_found_within_autoattack_is_no_gradients_merit(by_square: int, expected: str) -> None:
    evaluated = result({"PGD": (pgd(0.03), 0.6), "AA": (AUTO, 0.5), "Square": (SQUARE, 0.5)})
    evaluated.attacks["AA"]["found_by"] = {"model": {"apgd-ce": 400 - by_square, "clean": 100, "square": by_square}}
    evaluated.attacks["Square"]["found_by"] = {"model": {"clean": 100, "square": 400}}
    checks = {check.name: check for check in check_scores(evaluated)}
    assert checks["Square not stronger than white-box"].outcome == expected
    assert checks["Square within AutoAttack"].outcome == expected
    text = f"AA on model: Square misled {by_square} of 1000 samples that gradients did not"
    assert checks["Square within AutoAttack"].finding == text


def test_a_square_that_comes_first_says_nothing_of_gradients() -> None:
    evaluated = result({"AA": (AUTO | {"attacks": ["square", "apgd-ce"]}, 0.5)})
    evaluated.attacks["AA"]["found_by"] = {"model": {"clean": 100, "square": 400}}
    checks = {check.name: check for check in check_scores(evaluated)}
    assert checks["Square within AutoAttack"].outcome == "not run"


def test_a_curve_is_the_longest_group_that_differs_in_one_setting() -> None:
    columns = {"b": (pgd(0.05), 0.3), "a": (pgd(0.03), 0.5), "long": (pgd(0.03, 100), 0.5), "c": (pgd(0.1), 0.1)}
    assert curve(result(columns), "eps") == ["a", "b", "c"]
    assert curve(result(columns), "steps") == ["a", "long"]
    assert curve(result({"a": (pgd(0.05), 0.3)}), "eps") == []
