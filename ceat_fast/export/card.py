"""The model card: what the files are, how they were made, and how they were judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ceat_fast
from ceat_fast.data import Dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.environment import describe_environment
from ceat_fast.evaluation import EvaluationResult
from ceat_fast.evaluation.fingerprint import digest_model
from ceat_fast.training import Run
from ceat_fast.training.config import config_to_dict

PROGRAM = "ensemble.pt2"

Card = dict[str, Any]

_AVERAGES = {"prob": "the mean of their softmax probabilities", "logit": "the softmax of the mean of their logits"}


def make_card(run: Run, ensemble: Ensemble, dataset: Dataset, checkpoint: str, checksums: Mapping[str, str]) -> Card:
    """Everything about an exported ensemble as plain JSON values.

    Results are those of the run's evaluation.json if it judged these very weights, otherwise null.
    """
    config, records = run.config, run.metrics
    members = zip(config.models, ensemble.members, strict=True)
    return {
        "name": config.method.label,
        "members": [{"model": name, "parameters": sum(p.numel() for p in m.parameters())} for name, m in members],
        "input": {"shape": list(dataset.test_images.shape[1:]), "range": [0.0, 1.0], "type": "float32"},
        "output": {"classes": dataset.num_classes, "average": ensemble.average},
        "data": dataset.name,
        "checkpoint": checkpoint,
        "epochs": len(records),
        "last_epoch": {name: value for name, value in records[-1].items() if isinstance(value, int | float)}
        if records
        else {},
        "results": _results(run, ensemble),
        "settings": config_to_dict(config) | {"out": str(run.folder.name), "resume": False},
        "files": dict(checksums),
        "environment": describe_environment(),
        "ceat_fast": ceat_fast.__version__,
    }


def to_markdown(card: Card) -> str:
    """The card for readers."""
    image = "(B, " + ", ".join(map(str, card["input"]["shape"])) + ")"
    classes = card["output"]["classes"]
    lines = [
        f"# {card['name']}, {len(card['members'])} members, {card['data']}",
        "",
        f"Trained for {card['epochs']} epochs with ceat_fast {card['ceat_fast']}. Inputs: float32 images {image} in "
        "[0, 1], not normalised. `member-*.safetensors` hold the state_dict of each member, which gives logits "
        f"(B, {classes}); the ensemble's output is {_AVERAGES[card['output']['average']]}.",
        "",
        "| file | model | parameters |",
        "|---|---|---|",
        *(
            f"| member-{number}.safetensors | {member['model']} | {member['parameters']:,} |"
            for number, member in enumerate(card["members"])
        ),
        "",
        "```python",
        "from safetensors.torch import load_file",
        'model.load_state_dict(load_file("member-0.safetensors"))  # a model of your own class with the same names',
        *(
            [
                "import torch",
                f'program = torch.export.load("{PROGRAM}").module()',
                f"log_prob = program(images)  # {image} -> (B, {classes})",
            ]
            if PROGRAM in card["files"]
            else []
        ),
        "```",
        "",
        "## Results",
        "",
        *_result_lines(card["results"]),
        "",
        "`card.json` holds all settings, versions and checksums.",
        "",
    ]
    return "\n".join(lines)


def _results(run: Run, ensemble: Ensemble) -> Card | None:
    if not run.evaluation_path.is_file():
        return None
    result = EvaluationResult.load(run.evaluation_path)
    if result.about.get("fingerprint", {}).get("weights") != digest_model(ensemble):
        return None
    return {
        "accuracies": [
            {
                "subject": score.subject,
                "attack": score.attack,
                "accuracy": score.accuracy,
                "interval_95": list(score.interval),
                "samples": len(score.correct),
            }
            for score in result.scores
        ],
        "attacks": {name: attack["settings"] for name, attack in result.attacks.items()},
        "flags": [check.finding for check in result.flags],
    }


def _result_lines(results: Card | None) -> list[str]:
    if results is None:
        return ["These weights have not been judged. An export after `ceat-fast evaluate` shows what it found."]
    subjects = list(dict.fromkeys(entry["subject"] for entry in results["accuracies"]))
    cells = {(entry["attack"], entry["subject"]): entry for entry in results["accuracies"]}
    lines = [
        f"Accuracy in % on {results['accuracies'][0]['samples']:,} test images (95 % interval).",
        "",
        "| attack | " + " | ".join(subjects) + " |",
        "|---|" + "---|" * len(subjects),
    ]
    for attack in results["attacks"]:
        lines.append(f"| {attack} | " + " | ".join(_cell(cells.get((attack, subject))) for subject in subjects) + " |")
    return [*lines, *(f"\nFlag: {flag}" for flag in results["flags"])]


def _cell(entry: Card | None) -> str:
    if entry is None:
        return "-"
    low, high = entry["interval_95"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
