"""Taking an ensemble home: files that need neither ceat_fast nor the run folder.

member-0.safetensors, ...   the plain state_dict of each member: `model.load_state_dict(load_file(path))`
ensemble.pt2                a torch.export program, images (B, C, H, W) in [0, 1] -> log-probabilities (B, K) (eq. 1)
README.md, card.json        the model card: settings, results, and the checksum of each file
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ceat_fast.data import Dataset, load_dataset
from ceat_fast.ensemble import Ensemble
from ceat_fast.export.card import PROGRAM, make_card, to_markdown
from ceat_fast.files import PathLike, write_atomic, write_folder, write_json
from ceat_fast.training import Run
from ceat_fast.training.checkpoint import plain_copies


def export_run(
    run: Run, out: PathLike, *, checkpoint: str = "last", program: bool = True, dataset: Dataset | None = None
) -> Path:
    """Write the members of a run, their ensemble and a model card into a new folder; returns its path.

    Args:
        run: the run.
        out: the folder, which must not exist or be empty.
        checkpoint: "last", or "best" for that of the highest robust accuracy on held-out images.
        program: write the torch.export program too.
        dataset: gives the number of classes and the image size; default: the run's.

    Raises:
        ValueError: no such checkpoint, members that torch.export cannot trace, or `out` is the working directory.
        FileExistsError: `out` holds something.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"out={os.fspath(out)!r} exists and is not empty; choose another folder")
    if out.resolve() == Path.cwd():
        # The new folder takes its place, and a shell would go on showing the old one, which is empty.
        raise ValueError(f"out={os.fspath(out)!r} must not be the working directory; choose a folder in it")
    dataset = dataset or load_dataset(run.config.data.name, run.config.data.root)
    ensemble = run.load_ensemble(dataset, "cpu", checkpoint)
    image = dataset.test_images[:1].float() / dataset.scale

    def fill(folder: Path) -> None:
        for number, member in enumerate(ensemble.members):
            write_atomic(folder / f"member-{number}.safetensors", save(plain_copies(member.state_dict())))
        if program:
            traced = io.BytesIO()
            torch.export.save(export_program(ensemble, image), traced)
            write_atomic(folder / PROGRAM, traced.getvalue())
        checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        card = make_card(run, ensemble, dataset, checkpoint, checksums)
        write_json(folder / "card.json", card)
        write_atomic(folder / "README.md", to_markdown(card).encode())

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
    return out


def export_program(ensemble: Ensemble, image: Tensor) -> Any:
    """The torch.export program of an ensemble in eval mode, for any batch size; `image` is one input (1, ...).

    Raises:
        ValueError: torch.export cannot trace a member.
    """
    training = [module for module in ensemble.modules() if module.training]
    plain = Ensemble(list(ensemble.members), backend="loop", average=ensemble.average).eval()
    batch = torch.export.Dim("batch")
    try:
        return torch.export.export(plain, (image.expand(2, *image.shape[1:]),), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever the tracer meets in a model of the user's
        names = ", ".join(sorted({type(member).__name__ for member in ensemble.members}))
        raise ValueError(
            f"torch.export cannot trace this ensemble ({names}): {str(error).splitlines()[0]}; --program false leaves "
            "the program out"
        ) from error
    finally:
        for module in training:
            module.training = True
