"""CEAT in a training loop of your own: any models, any optimizer. Run: python examples/own_loop.py"""

from __future__ import annotations

import torch

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.data import iterate_batches, load_dataset
from ceat_fast.loss import CEATLoss
from ceat_fast.models import digits_resnet


def main(epochs: int = 3) -> float:
    """Train three small networks on the digits; returns the clean test accuracy of the ensemble."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ensemble = Ensemble([digits_resnet() for _ in range(3)]).to(device)
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.02, momentum=0.9) for member in ensemble.members]
    attack = PGD(eps=0.05, alpha=0.02, steps=3)
    criterion = CEATLoss(lam=1.0, mu=5.0)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    generator = torch.Generator().manual_seed(0)

    for epoch in range(epochs):
        for x, y, _ in iterate_batches(images, labels, 64, generator, scale=data.scale):
            x_adv = attack(ensemble.eval(), x, y)
            ensemble.train()
            losses = criterion(ensemble.member_logits(x_adv), ensemble.member_logits(x), y)
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        print(f"epoch {epoch + 1}: loss of each member {[round(loss, 3) for loss in losses.tolist()]}")

    with torch.no_grad():
        test = data.test_images.to(device).float() / data.scale
        accuracy = (ensemble.eval()(test).argmax(1) == data.test_labels.to(device)).float().mean().item()
    print(f"clean test accuracy of the ensemble: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
