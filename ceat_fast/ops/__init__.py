"""One contract, several backends.

Each backend module offers the same calls (`reference` is the specification and returns differentiable values instead):

    ceat_loss(adv, nat, target, settings, need_grad, need_parts) -> (loss, adv_grad, nat_grad, parts)
    ensemble_cross_entropy(logits, target, reduction, need_grad) -> (loss, grad)
    pgd_step(x_adv, grad, x, alpha, eps)                         -> x_adv
    scale_gradients(adv_grad, nat_grad, loss_grad)               -> (adv_grad, nat_grad)

Gradients are those of the sum of all returned losses, in fresh memory. They come in the dtype of the logits, but in
fp32 for fp16 logits: a gradient divided by the batch size would underflow there before a loss scale can save it.
"""
