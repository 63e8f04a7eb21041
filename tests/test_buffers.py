"""Memory that is lent again: never while somebody refers to it."""

from __future__ import annotations

import torch

from ceat_fast.ops.buffers import Buffers

LIKE = torch.zeros(1)


def test_memory_comes_back_with_the_last_reference() -> None:
    buffers = Buffers()
    first = buffers.take(LIKE, (2, 3, 4))
    place = first.data_ptr()
    assert first.shape == (2, 3, 4)
    assert first.is_contiguous()
    part = first[0].T
    del first
    second = buffers.take(LIKE, (2, 3, 4))  # the view of a part is enough to keep it
    assert second.data_ptr() != place
    del part
    assert buffers.take(LIKE, (2, 3, 4)).data_ptr() == place
    assert buffers.take(LIKE, (2, 3, 5)).data_ptr() not in (place, second.data_ptr())


def test_what_autograd_saved_is_not_lent() -> None:
    buffers = Buffers()
    weight = torch.ones(2, 3, 4, requires_grad=True)
    saved = buffers.take(LIKE, (2, 3, 4)).fill_(5.0)
    product = (weight * saved).sum()
    del saved
    buffers.take(LIKE, (2, 3, 4)).fill_(7.0)
    (grad,) = torch.autograd.grad(product, weight)
    assert torch.equal(grad, torch.full((2, 3, 4), 5.0))


def test_another_batch_size_and_closing_let_go() -> None:
    buffers = Buffers()
    kept = buffers.take(LIKE, (2, 3, 4))
    buffers.take(LIKE, (2, 5, 4))
    assert list(buffers._kept) == [(torch.float32, (2, 5, 4))]
    kept.fill_(1.0)  # it is the borrower's now
    buffers.close()
    buffers.take(LIKE, (2, 5, 4))
    assert not buffers._kept
    buffers.open()
    buffers.take(LIKE, (2, 5, 4))
    assert buffers._kept


def test_without_a_count_of_uses_nothing_is_kept(monkeypatch) -> None:
    monkeypatch.setattr("ceat_fast.ops.buffers._uses", None)
    buffers = Buffers()
    assert buffers.take(LIKE, (2, 3, 4)).shape == (2, 3, 4)
    assert not buffers._kept


def test_types_do_not_share_memory() -> None:
    buffers = Buffers()
    place = buffers.take(LIKE, (2, 3, 4)).data_ptr()
    other = buffers.take(LIKE.bfloat16(), (2, 3, 4))
    assert other.dtype == torch.bfloat16
    assert other.data_ptr() != place
