"""Eq. 22 one sample, one member and one class at a time, in 50-digit arithmetic, straight from the definition."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

DIGITS = 50


def softmax(logits: Tensor) -> list[mpmath.mpf]:
    exponentials = [mpmath.exp(mpmath.mpf(z)) for z in logits.tolist()]
    total = mpmath.fsum(exponentials)
    return [e / total for e in exponentials]


def disparity(true_prob: list[mpmath.mpf], m: int, pair_reduction: str) -> mpmath.mpf:
    peers = [h for i, h in enumerate(true_prob) if i != m]
    gaps = [abs(peers[i] - peers[j]) for i in range(len(peers)) for j in range(i + 1, len(peers))]
    if not gaps:
        return mpmath.mpf(0)
    return {"max": max(gaps), "mean": mpmath.fsum(gaps) / len(gaps), "sum": mpmath.fsum(gaps)}[pair_reduction]


def ceat_loss(
    adv: Tensor,
    nat: Tensor,
    target: Tensor,
    *,
    lam: float,
    mu: float,
    lam_exponent: float | None = None,
    mu_exponent: float | None = None,
    pair_reduction: str = "max",
    detach_nat: bool = False,
    max_weight: float | None = None,
    ce_coefficient: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(M, B) losses and the gradients of their sum with respect to adv and nat, (M, B, K), as float64."""
    members, samples, classes = adv.shape
    loss = torch.zeros(members, samples, dtype=torch.float64)
    adv_grad = torch.zeros(members, samples, classes, dtype=torch.float64)
    nat_grad = torch.zeros_like(adv_grad)
    with mpmath.workdps(DIGITS):
        for b in range(samples):
            y = int(target[b])
            p_adv = [softmax(adv[m, b]) for m in range(members)]
            p_nat = [softmax(nat[m, b]) for m in range(members)]
            for m in range(members):
                d_nat = disparity([p[y] for p in p_nat], m, pair_reduction)
                d_adv = disparity([p[y] for p in p_adv], m, pair_reduction)
                w_nat = mpmath.exp((lam if lam_exponent is None else lam_exponent) * d_nat)
                w_adv = mpmath.exp((mu if mu_exponent is None else mu_exponent) * d_adv)
                if max_weight is not None:
                    w_nat, w_adv = min(w_nat, max_weight), min(w_adv, max_weight)
                onehot = [1 if k == y else 0 for k in range(classes)]
                l_nat = mpmath.fsum((p - o) ** 2 for p, o in zip(p_nat[m], onehot, strict=True))
                l_adv = mpmath.fsum((p - q) ** 2 for p, q in zip(p_adv[m], p_nat[m], strict=True))
                ce = -mpmath.log(p_adv[m][y])
                loss[m, b] = float(ce_coefficient * ce + lam * w_nat * l_nat + mu * w_adv * l_adv)

                u_adv = [2 * mu * w_adv * (p - q) for p, q in zip(p_adv[m], p_nat[m], strict=True)]
                u_nat = [2 * lam * w_nat * (p - o) for p, o in zip(p_nat[m], onehot, strict=True)]
                if not detach_nat:
                    u_nat = [u - v for u, v in zip(u_nat, u_adv, strict=True)]
                mean_adv = mpmath.fsum(u * p for u, p in zip(u_adv, p_adv[m], strict=True))
                mean_nat = mpmath.fsum(u * p for u, p in zip(u_nat, p_nat[m], strict=True))
                for k in range(classes):
                    through_softmax = p_adv[m][k] * (u_adv[k] - mean_adv)
                    adv_grad[m, b, k] = float(through_softmax + ce_coefficient * (p_adv[m][k] - onehot[k]))
                    nat_grad[m, b, k] = float(p_nat[m][k] * (u_nat[k] - mean_nat))
    return loss, adv_grad, nat_grad


def ensemble_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) cross-entropies of the mean probability and the gradient of their sum, (M, B, K), as float64."""
    members, samples, classes = logits.shape
    loss = torch.zeros(samples, dtype=torch.float64)
    grad = torch.zeros(members, samples, classes, dtype=torch.float64)
    with mpmath.workdps(DIGITS):
        for b in range(samples):
            y = int(target[b])
            probs = [softmax(logits[m, b]) for m in range(members)]
            total = mpmath.fsum(p[y] for p in probs)
            loss[b] = float(-mpmath.log(total / members))
            for m in range(members):
                for k in range(classes):
                    grad[m, b, k] = float(probs[m][y] / total * (probs[m][k] - (k == y)))
    return loss, grad
