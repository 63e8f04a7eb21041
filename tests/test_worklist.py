"""The work list with searches that follow a script: which run counts, what is claimed and rejected, and whose noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from attack_models import linear
from torch import Tensor, nn

from ceat_fast.attacks.search_attack import SearchAttack
from ceat_fast.attacks.worklist import Passes, Rows, Search, Start, fresh

Shown = tuple[float, float, bool]  # score, rise of every pixel, claim


@dataclass
class ScriptRows(Rows):
    run: Tensor


class ScriptSearch(Search[ScriptRows]):
    """Shows a point per run and step."""

    def __init__(self, view: nn.Module, slack: float, script: list[list[Shown]], keys: list[int]) -> None:
        super().__init__(view, slack)
        self.script, self.runs, self.steps = script, len(script), len(script[0])
        self.keys = keys

    def begin(self, start: Start) -> ScriptRows:
        self.keys += start.noise_key.tolist()
        return ScriptRows(**fresh(start), run=start.run)

    def advance(self, rows: ScriptRows, step: Tensor) -> Passes:
        shown = [self.script[run][at] for run, at in zip(rows.run.tolist(), step.tolist(), strict=True)]
        score, rise, claims = (torch.tensor(values) for values in zip(*shown, strict=True))
        rows.observe(rows.x + rise.double().view(-1, 1, 1, 1), score.double(), claims)
        return Passes(1, 0)


@dataclass(frozen=True)
class Scripted(SearchAttack):
    script: list[list[Shown]] = field(kw_only=True)
    keys: list[int] = field(default_factory=list, kw_only=True)
    name = "scripted"

    def search(self, view: nn.Module, slack: float, classes: int) -> ScriptSearch:
        return ScriptSearch(view, slack, self.script, self.keys)


MODEL = linear([[0.0, 0, 0, 0], [1, 1, 1, 1]], [2.5, 0.0])  # is misled where every pixel rises by 0.125
IMAGE = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)


def rise_of(*script: list[Shown]) -> float:
    """How far the pixels of a misled image rose."""
    result = Scripted(0.4, script=list(script)).run(MODEL, IMAGE, torch.tensor([0]))
    assert result.fooled.all()
    (rise,) = (result.x_adv - IMAGE).unique().tolist()
    return round(rise, 6)


NOTHING: Shown = (-9.0, 0.0, False)


def test_of_two_successes_that_of_the_lower_run_counts_even_if_it_comes_later() -> None:
    assert rise_of([NOTHING, NOTHING, (1.0, 0.2, True)], [(2.0, 0.3, True), NOTHING, NOTHING]) == 0.2


def test_the_search_goes_on_after_a_claim_that_is_rejected() -> None:
    assert rise_of([(0.0, 0.1, True), (1.0, 0.2, True), NOTHING]) == 0.2


def test_every_run_of_every_sample_has_noise_of_its_own() -> None:
    """A search may add up to 65,535 to its key."""
    attack = Scripted(0.4, script=[[NOTHING]] * 3)
    attack.run(MODEL, IMAGE.repeat(2, 1, 1, 1), torch.tensor([0, 0]), torch.tensor([7, 8]))
    assert len(attack.keys) == 6
    assert all(after - before >= 2**16 for before, after in pairwise(sorted(attack.keys)))


@pytest.mark.parametrize(("slack", "claimed"), [(0.0, [False, False, True]), (0.1, [False, True, True])])
def test_what_is_claimed_a_little_early_where_the_view_is_not_exact(slack: float, claimed: list[bool]) -> None:
    """Margins of -0.15, -0.05 and 0.05; the outputs range over 1 or a little more."""
    search = ScriptSearch(MODEL, slack, [[NOTHING]], [])
    outputs = torch.tensor([[1.0, 0.85, 0.0], [1.0, 0.95, 0.0], [1.0, 1.05, 0.0]])
    margins, claims = search.success(outputs, torch.zeros(3, dtype=torch.int64))
    assert margins.tolist() == pytest.approx([-0.15, -0.05, 0.05], abs=1e-6)
    assert claims.tolist() == claimed
