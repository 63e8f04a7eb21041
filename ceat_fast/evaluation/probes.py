"""Probes of a model for what makes attacks look weaker than they are: masked gradients, randomness, outputs that are no
logits (Athalye et al. 2018, Carlini et al. 2019, and the flags of Croce and Hein's AutoAttack).

Each probe looks at every subject on the same few samples and returns one `Check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ceat_fast.attacks import PGD, keyed_uniform
from ceat_fast.attacks.noise import name_key
from ceat_fast.attacks.objective import Objective
from ceat_fast.ensemble import frozen, is_ensemble
from ceat_fast.evaluation.result import FLAG, NOT_RUN, OK, Check
from ceat_fast.evaluation.verdicts import ENSEMBLE, MEMBERS, judge, perturb, subject_logits, subjects_of

_FORWARDS = 4  # repetitions of the same forward pass
_SPREAD = 1e-4  # of logits scaled to length 1, as AutoAttack tolerates
_BATCH_SPREAD = 1e-3  # other batch sizes round differently
_NOISE_DRAWS = 20
_NOISE_KEY = name_key("corner")

MASKED = "gradients may be masked: add AutoAttack, more steps, restarts and the margin loss, and do not quote PGD alone"


def tolerance(samples: int) -> float:
    """How much an accuracy may be off before a comparison of two attacks is flagged: 1 %, or 2 samples."""
    return max(0.01, 2 / samples)


@dataclass
class Probe:
    """A model, some samples and the white-box attack to compare with.

    Attributes:
        model: in eval mode.
        x, y, index: (B, ...) in [0, 1], (B,) labels and (B,) sample numbers, on the model's device.
        reference: PGD with the eps and alpha of the evaluation.
        members: look at each member of an `Ensemble` too.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    reference: PGD
    members: bool = True

    def run(self) -> Iterator[Check]:
        """All checks, one after the other."""
        yield self.deterministic()
        yield self.batch_independent()
        yield self.logits()
        yield self.zero_gradients()
        yield self.unbounded()
        yield self.single_step()
        yield self.more_steps()
        yield self.random_noise()
        yield self.transfer_from_members()

    def deterministic(self) -> Check:
        """Repeated forward passes give the same logits."""
        spread = 0.0
        for goal in self.goals:
            first = _unit(self._clean_logits[goal])
            for _ in range(_FORWARDS - 1):
                again = _unit(subject_logits(self.model, goal, self.x.unsqueeze(0)))
                spread = max(spread, (again - first).abs().max().item())
        return _check(
            "deterministic",
            spread <= _SPREAD,
            f"{_FORWARDS} passes over the same inputs differ by {spread:.1e} (logits of length 1)",
            "the model is randomised: gradients have to be averaged over the randomness (AutoAttack's rand version)",
        )

    def batch_independent(self) -> Check:
        """The logits of a sample do not depend on its neighbours in the batch."""
        reverse = torch.arange(len(self.x) - 1, -1, -1, device=self.x.device)
        parts = torch.tensor_split(reverse, min(3, len(self.x)))
        spread = 0.0
        for goal in self.goals:
            outputs = [subject_logits(self.model, goal, self.x[rows].unsqueeze(0)) for rows in parts]
            other = _unit(torch.cat(outputs, 1).flip(1))
            spread = max(spread, (other - _unit(self._clean_logits[goal])).abs().max().item())
        return _check(
            "independent of the batch",
            spread <= _BATCH_SPREAD,
            f"logits in other batches differ by {spread:.1e} (logits of length 1)",
            "samples influence each other: verdicts depend on the batch size; evaluate one image at a time",
        )

    def logits(self) -> Check:
        """The model returns logits or log-probabilities, not probabilities."""
        guilty = []
        for goal, names in self.goals.items():
            for name, rows in zip(names, self._clean_logits[goal], strict=True):
                if bool(((rows >= 0) & (rows <= 1)).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-3).all()):
                    guilty.append(name)
        return _check(
            "logits",
            not guilty,
            f"{', '.join(guilty)}: outputs lie in [0, 1] and sum to 1" if guilty else "outputs are no probabilities",
            "return logits or log-probabilities: a second softmax flattens the gradients",
        )

    def zero_gradients(self) -> Check:
        """No correctly classified sample has a cross-entropy gradient of exactly zero."""
        shares = {}
        for goal, names in self.goals.items():
            with frozen(self.model) as view:
                x = self.x.expand(len(names), *self.x.shape) if goal == MEMBERS else self.x
                gradient = Objective(view, self.y, goal, "ce", False).gradient(x)[1]
            zero = (gradient.reshape(len(names), len(self.x), -1) == 0).all(-1)
            correct = self._clean_logits[goal].argmax(-1) == self.y
            for name, flags, right in zip(names, zero, correct, strict=True):
                shares[name] = (flags & right).sum().item() / max(int(right.sum()), 1)
        name, share = max(shares.items(), key=lambda item: item[1])
        return _check(
            "zero gradients",
            share == 0,
            f"{share:.1%} of the samples that {name} gets right have a gradient of exactly zero",
            "the cross-entropy saturates there: use the margin or DLR loss (CW, AutoAttack) or divide the logits",
        )

    def unbounded(self) -> Check:
        """An attack that may change everything succeeds on every sample."""
        attack = replace(self.reference, eps=1.0, alpha=0.1, steps=50, random_start=True, norm="Linf")
        name, accuracy = self._most(self._accuracies(attack))
        return _check(
            "unbounded attack", accuracy == 0, f"eps 1, 50 steps leave {name} an accuracy of {accuracy:.1%}", MASKED
        )

    def single_step(self) -> Check:
        """One step of length eps is not stronger than the reference attack."""
        single = replace(self.reference, alpha=self.reference.eps, steps=1, random_start=False, restarts=1)
        return self._compare("single step", "one step", self._accuracies(single), self._white_box)

    def more_steps(self) -> Check:
        """Five times the steps are not weaker."""
        attack = replace(self.reference, steps=5 * self.reference.steps)
        name = f"{self.reference.steps} steps"
        return self._compare("more steps", name, self._white_box, self._accuracies(attack), f"{attack.steps} steps")

    def random_noise(self) -> Check:
        """Random corners of the ball are not stronger than the reference attack."""
        if self.reference.norm != "Linf":
            return Check("random noise", NOT_RUN, f"only for Linf, not {self.reference.norm}")
        survives = {goal: torch.ones(len(names), len(self.x)).bool() for goal, names in self.goals.items()}
        for draw in range(_NOISE_DRAWS):
            noise = keyed_uniform(self.index, self.x.shape[1:], (_NOISE_KEY, draw), self.x.dtype)
            corners = (self.x + (2 * (noise >= 0.5) - 1) * self.reference.radius).clamp(0, 1).unsqueeze(0)
            for goal in self.goals:
                survives[goal] &= judge(self.model, goal, corners, self.y, self.index)[0].cpu()
        accuracies = {
            name: flags.float().mean().item()
            for goal, names in self.goals.items()
            for name, flags in zip(names, survives[goal], strict=True)
        }
        return self._compare("random noise", f"the worst of {_NOISE_DRAWS} draws", accuracies, self._white_box)

    def transfer_from_members(self) -> Check:
        """Inputs made against a member alone do not fool the ensemble more than inputs made against the ensemble."""
        if not is_ensemble(self.model) or len(self.model.members) < 2:
            return Check("transfer from members", NOT_RUN, "only for ensembles of at least two")
        x_adv = perturb(self.reference, self.model, MEMBERS, self.x, self.y, self.index)
        correct = [judge(self.model, ENSEMBLE, row.unsqueeze(0), self.y, self.index)[0] for row in x_adv]
        accuracies = [flags.float().mean().item() for flags in correct]
        source = accuracies.index(min(accuracies))
        transferred = {"ensemble": accuracies[source]}
        label = f"inputs against member {source}"
        return self._compare("transfer from members", label, transferred, self._white_box)

    @cached_property
    def goals(self) -> dict[str, list[str]]:
        return subjects_of(self.model, self.members)

    @cached_property
    def _clean_logits(self) -> dict[str, Tensor]:
        return {goal: subject_logits(self.model, goal, self.x.unsqueeze(0)) for goal in self.goals}

    @cached_property
    def _white_box(self) -> dict[str, float]:
        return self._accuracies(self.reference)

    def _accuracies(self, attack: PGD) -> dict[str, float]:
        found: dict[str, float] = {}
        for goal, names in self.goals.items():
            x_adv = perturb(attack, self.model, goal, self.x, self.y, self.index)
            correct = judge(self.model, goal, x_adv, self.y, self.index)[0]
            found |= dict(zip(names, correct.float().mean(-1).tolist(), strict=True))
        return found

    def _compare(
        self,
        name: str,
        weak: str,
        weak_accuracies: dict[str, float],
        strong_accuracies: dict[str, float],
        strong: str = "the white-box attack",
    ) -> Check:
        """Flag where what should be the weaker attack leaves less accuracy."""
        excess = {who: strong_accuracies[who] - accuracy for who, accuracy in weak_accuracies.items()}
        who, largest = self._most(excess)
        finding = (
            f"{who}: {strong} leaves {strong_accuracies[who]:.1%}, {weak} {weak_accuracies[who]:.1%} "
            f"({len(self.x)} samples)"
        )
        return _check(name, largest <= tolerance(len(self.x)), finding, MASKED)

    @staticmethod
    def _most(values: dict[str, float]) -> tuple[str, float]:
        return max(values.items(), key=lambda item: item[1])


def _check(name: str, passed: bool, finding: str, advice: str) -> Check:
    return Check(name, OK, finding) if passed else Check(name, FLAG, finding, advice)


def _unit(logits: Tensor) -> Tensor:
    """Rows scaled to length 1; -inf counts as a very negative number."""
    return nn.functional.normalize(logits.nan_to_num(neginf=-1e4), dim=-1)
