"""The batched ensemble against its members one by one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ceat_fast.ensemble import Ensemble, Execution, frozen
from ceat_fast.models import resnet20

BATCHED = ("vmap", "auto")


class SmallNet(nn.Module):
    """Convolution, batch normalisation and head: what the batched run has to treat per member."""

    def __init__(self, width: int = 4, classes: int = 3, momentum: float | None = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.dropout(F.relu(self.bn(self.conv(x))).mean((2, 3))))


@pytest.fixture(autouse=True)
def auto_decides_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("ceat_fast.ensemble.ensemble.default_execution", lambda *_: Execution("vmap"))


def small_members(count=3, **kwargs):
    torch.manual_seed(0)
    return [SmallNet(**kwargs).double() for _ in range(count)]


def images(batch=5, seed=1):
    return torch.rand(batch, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 1, 2, 1, 0])


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-12, rtol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["loop", *BATCHED])
def test_output_is_the_log_of_the_mean_member_probability(backend):
    ens = Ensemble(small_members(), backend).eval()
    x = images()
    mean = sum(member(x).exp() / member(x).exp().sum(1, keepdim=True) for member in ens.members) / 3
    assert_close(ens(x), mean.log())


def test_logit_average_is_the_softmax_of_the_mean_logits():
    ens = Ensemble(small_members(), average="logit").eval()
    x = images()
    mean = sum(member(x) for member in ens.members) / 3
    assert_close(ens(x), mean - mean.exp().sum(1, keepdim=True).log())


def test_log_probabilities_of_half_precision_members_are_fp32():
    ens = Ensemble([nn.Linear(4, 3).bfloat16() for _ in range(2)])
    assert ens.member_logits(torch.rand(2, 4).bfloat16()).dtype == torch.bfloat16
    assert ens(torch.rand(2, 4).bfloat16()).dtype == torch.float32


def test_state_dict_keys_are_the_members_own():
    ens = Ensemble(small_members(2))
    own = ens.members[0].state_dict().keys()
    assert list(ens.state_dict()) == [f"members.{m}.{key}" for m in range(2) for key in own]


@pytest.mark.parametrize("backend", BATCHED)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_batched_equals_training_in_a_loop(backend, optimizer):
    """Three steps with an optimizer per member: parameters, running statistics and batch counters agree."""
    ensembles = [Ensemble(small_members(), name) for name in ("loop", backend)]
    for ens in ensembles:
        make = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adam": torch.optim.Adam}[optimizer]
        optimizers = [make(member.parameters()) for member in ens.members]
        for step in range(3):
            logits = ens.member_logits(images(seed=step))
            losses = torch.stack([F.cross_entropy(z, LABELS) for z in logits])
            for o in optimizers:
                o.zero_grad()
            losses.sum().backward()
            for o in optimizers:
                o.step()
    assert_same_state(*ensembles)
    assert ensembles[1].members[2].bn.num_batches_tracked.item() == 3
    assert ensembles[1].members[0].bn.running_mean.abs().min() > 0
    for ens in ensembles:
        ens.eval()
    assert_close(ensembles[0](images()), ensembles[1](images()))


def test_resnet20_batched_equals_loop():
    """The real model once, train mode: projections, nested stages, normalisation buffers."""
    torch.manual_seed(0)
    loop = Ensemble([resnet20().double() for _ in range(2)], "loop")
    batched = Ensemble(copy.deepcopy(list(loop.members)), "vmap")
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    a, b = loop.member_logits(x), batched.member_logits(x)
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    for z in (a, b):
        z.square().sum().backward()
    for p, q in zip(loop.parameters(), batched.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(
        loop.members[1].stages[2][0].bn1.running_var, batched.members[1].stages[2][0].bn1.running_var
    )


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_one_input_per_member(backend):
    ens = Ensemble(small_members(), backend).eval()
    x = torch.stack([images(seed=s) for s in range(3)])
    expected = torch.stack([member(x[m]) for m, member in enumerate(ens.members)])
    assert_close(ens.member_logits(x), expected)
    assert_close(ens.member_logits(x, per_member=True), expected)


def test_a_shared_input_of_five_dimensions_has_to_be_named():
    """Volumes (B, C, D, H, W) with B = M look like one image batch per member."""
    torch.manual_seed(0)
    ens = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(8, 2)) for _ in range(2)])
    x = torch.rand(2, 1, 2, 2, 2)
    expected = torch.stack([member(x) for member in ens.members])
    torch.testing.assert_close(ens.member_logits(x, per_member=False), expected)


def test_flat_inputs_per_member():
    torch.manual_seed(0)
    ens = Ensemble([nn.Linear(4, 2) for _ in range(3)])
    x = torch.rand(3, 5, 4)
    expected = torch.stack([member(x[m]) for m, member in enumerate(ens.members)])
    torch.testing.assert_close(ens.member_logits(x, per_member=True), expected)
    with pytest.raises(ValueError, match=r"needs x of shape \(3, B, ...\), got \(2, 5, 4\)"):
        ens.member_logits(x[:2], per_member=True)


@pytest.mark.parametrize("per_member", [False, True])
def test_mixed_architectures_come_back_in_member_order(per_member):
    """Groups {0, 2}, {1, 4}, {3}: interleaved, so that an order by group would be seen."""
    torch.manual_seed(0)
    members = [SmallNet(width).double() for width in (4, 6, 4, 8, 6)]
    ens = Ensemble(members, "vmap").eval()
    x = torch.stack([images(seed=s) for s in range(5)]) if per_member else images()
    expected = torch.stack([member(x[m] if per_member else x) for m, member in enumerate(members)])
    assert_close(ens.member_logits(x, per_member), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.bn, "eps", 0.5),
        lambda net: setattr(net.conv, "padding_mode", "circular"),
        lambda net: setattr(net, "forward", lambda x: net.fc(net.conv(x).mean((2, 3)))),
        lambda net: setattr(net, "scale", torch.tensor([1.0, 2.0])),
        lambda net: setattr(net, "bn", nn.Identity()),
    ],
    ids=["attribute", "string", "forward", "plain tensor", "submodule"],
)
def test_members_that_differ_beyond_their_tensors_are_not_merged(change):
    members = small_members()
    change(members[1])
    ens = Ensemble(members, "vmap").eval()
    assert_close(ens.member_logits(images()), torch.stack([member(images()) for member in members]))


def test_torch_func_transforms():
    """Over the input with either execution, over the parameters with the loop."""
    ens = Ensemble(small_members(), "vmap").eval()
    x = images().requires_grad_()
    ens(x).square().sum().backward()
    assert_close(torch.func.grad(lambda z: ens(z).square().sum())(x.detach()), x.grad)

    ens.backend = "loop"
    parameters = {name: p.detach() for name, p in ens.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(ens, p, (x,)).square().sum())(parameters)
    for name, p in ens.named_parameters():
        assert_close(gradients[name], p.grad)


def test_members_that_share_parameters():
    trunk = nn.Linear(4, 4).double()
    torch.manual_seed(0)
    members = [nn.Sequential(trunk, nn.Linear(4, 3).double()) for _ in range(3)]
    ens = Ensemble([*members, members[0]], "vmap")
    x = torch.rand(5, 4, dtype=torch.float64)
    ens.member_logits(x).sum().backward()
    batched = trunk.weight.grad.clone()
    trunk.weight.grad = None
    torch.stack([member(x) for member in (*members, members[0])]).sum().backward()
    assert_close(batched, trunk.weight.grad)


def test_dropout_masks_differ_between_members():
    member = SmallNet(dropout=0.5, width=64)
    ens = Ensemble([member, copy.deepcopy(member)], "vmap").train()
    a, b = ens.member_logits(torch.rand(4, 1, 4, 4))
    assert not torch.allclose(a, b)


def test_second_derivatives_pass_through_the_batched_run():
    """A penalty on the input gradient: its parameter gradients equal the loop's."""
    grads = []
    for backend in ("loop", "vmap"):
        ens = Ensemble(small_members(), backend).eval()
        x = images().requires_grad_()
        (g,) = torch.autograd.grad(ens.member_logits(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        grads.append([p.grad for p in ens.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b) if a is not None else None
        assert (a is None) == (b is None)


def test_a_frozen_member_gets_no_gradient():
    ens = Ensemble(small_members(), "vmap")
    ens.members[1].requires_grad_(False)
    ens.member_logits(images()).sum().backward()
    assert all(p.grad is None for p in ens.members[1].parameters())
    assert all(p.grad is not None for p in (*ens.members[0].parameters(), *ens.members[2].parameters()))


class AssigningNet(nn.Module):
    """Keeps a statistic by assignment instead of in place."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        z = self.fc(x)
        self.mean = 0.5 * self.mean + 0.5 * z.mean(0).detach()
        return z


def test_buffers_that_a_member_assigns_are_kept():
    torch.manual_seed(0)
    loop = Ensemble([AssigningNet() for _ in range(2)], "loop")
    batched = Ensemble(copy.deepcopy(list(loop.members)), "vmap")
    x = torch.rand(5, 4)
    for _ in range(2):
        loop.member_logits(x), batched.member_logits(x)
    assert loop.members[1].mean.abs().sum() > 0
    torch.testing.assert_close(batched.members[1].mean, loop.members[1].mean)


def storages(ens):
    return {member.conv.weight.untyped_storage().data_ptr() for member in ens.members}


def test_no_copy_is_made_after_the_first_run():
    ens = Ensemble(small_members(), "vmap")
    optimizer = torch.optim.SGD(ens.parameters(), 0.1)
    ens.member_logits(images()).sum().backward()
    (storage,) = storages(ens)
    gradients = {member.conv.weight.grad.untyped_storage().data_ptr() for member in ens.members}
    assert len(gradients) == 1
    optimizer.step()
    ens.load_state_dict(copy.deepcopy(ens.state_dict()))
    ens.member_logits(images())
    assert storages(ens) == {storage}


@pytest.mark.parametrize("backend", ["loop", "auto"])
def test_a_looping_ensemble_leaves_the_parameters_where_they_are(backend, monkeypatch):
    """On a CPU, "auto" loops."""
    monkeypatch.undo()
    members = small_members()
    before = [p.data_ptr() for m in members for p in m.parameters()]
    Ensemble(members, backend).member_logits(images())
    assert [p.data_ptr() for m in members for p in m.parameters()] == before


def replace_member(ens):
    ens.members[1] = SmallNet().double()
    return ens


def replace_head(ens):
    for member in ens.members:
        member.fc = nn.Linear(4, 7).double()
    return ens


def replace_one_parameter(ens):
    ens.members[2].fc.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    return ens


def rewrap_one_parameter(ens):
    """A new Parameter on the same memory: only its identity tells."""
    ens.members[2].fc.weight = nn.Parameter(ens.members[2].fc.weight.data)
    return ens


def assign_state(ens):
    state = {key: value + 1 for key, value in ens.state_dict().items()}
    ens.load_state_dict(state, assign=True)
    return ens


def append_member(ens):
    ens.members.append(SmallNet().double())
    return ens


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda ens: ens.float().double(),
        replace_member,
        replace_head,
        replace_one_parameter,
        rewrap_one_parameter,
        assign_state,
        append_member,
    ],
    ids=lambda f: f.__name__.replace("<lambda>", "dtype"),
)
def test_changes_of_the_members_reach_the_batched_run(change):
    ens = Ensemble(small_members(), "vmap").eval()
    ens.member_logits(images())
    ens = change(ens).eval()
    expected = torch.stack([member(images()) for member in ens.members])
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in ens.parameters()]
    ens.zero_grad()
    result = ens.member_logits(images())
    assert_close(result, expected)
    result.square().sum().backward()
    for p, gradient in zip(ens.parameters(), gradients, strict=True):
        assert_close(p.grad, gradient)


def test_a_copy_is_independent():
    ens = Ensemble(small_members(), "vmap").eval()
    before = ens(images())
    other = copy.deepcopy(ens)
    other(images())
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_close(ens(images()), before)
    assert_close(other(images()), torch.full((5, 3), 1 / 3, dtype=torch.float64).log())


def test_changed_attributes_count_after_regroup():
    ens = Ensemble(small_members(), "vmap").eval()
    ens(images())
    ens.members[1].bn.eps = 3.0
    ens.regroup()
    assert_close(ens.member_logits(images())[1], ens.members[1](images()))


def test_save_and_load():
    ens = Ensemble(small_members(), "vmap")
    ens.member_logits(images())
    file = io.BytesIO()
    torch.save(ens.state_dict(), file)
    file.seek(0)
    other = Ensemble([SmallNet().double() for _ in range(3)], "vmap")
    other.member_logits(images())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(ens, other)
    assert_close(ens.eval()(images()), other.eval()(images()))


def test_an_update_between_forward_and_backward_is_an_error_as_in_plain_torch():
    ens = Ensemble(small_members(), "vmap")
    loss = ens.member_logits(images()).sum()
    with torch.no_grad():
        ens.members[0].conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_cumulative_batch_norm_loops_in_auto_and_raises_in_vmap():
    """momentum=None reads the batch counter as a number, which vmap cannot. Statistics must not be updated twice."""
    loop = Ensemble(small_members(momentum=None), "loop")
    auto = Ensemble(small_members(momentum=None), "auto")
    for seed in range(2):
        assert_close(auto.member_logits(images(seed=seed)), loop.member_logits(images(seed=seed)))
    assert_same_state(loop, auto)
    vmap = Ensemble(small_members(momentum=None), "vmap")
    before = copy.deepcopy(vmap.state_dict())
    with pytest.raises(
        RuntimeError, match=r"backend='vmap' failed on members 0, 1, 2 \(SmallNet\).*use backend='loop'"
    ):
        vmap.member_logits(images())
    assert all(torch.equal(value, before[key]) for key, value in vmap.state_dict().items())


def test_hooks_run_once_per_member_with_its_own_tensors():
    seen = []
    members = small_members()
    members[1].fc.register_forward_hook(lambda module, args, output: seen.append(output))
    ens = Ensemble(members, "auto").eval()
    logits = ens.member_logits(images())
    assert len(seen) == 1
    assert_close(seen[0], logits[1])
    ens.backend = "vmap"
    with pytest.raises(RuntimeError, match="hook on a Linear"):
        ens.member_logits(images())


def test_members_in_different_modes():
    ens = Ensemble(small_members(), "auto").eval()
    ens.members[1].bn.train()
    expected = copy.deepcopy(ens.members[1])(images())
    assert_close(ens.member_logits(images())[1], expected)
    assert [m.bn.num_batches_tracked.item() for m in ens.members] == [0, 1, 0]
    ens.backend = "vmap"
    with pytest.raises(RuntimeError, match="train/eval modes differ"):
        ens.member_logits(images())


def test_a_wrong_input_is_not_taken_for_a_model_that_cannot_be_batched():
    ens = Ensemble(small_members(), "auto").eval()
    with pytest.raises(RuntimeError, match="channels"):
        ens(torch.rand(2, 5, 4, 4, dtype=torch.float64))
    ens(images())
    assert len(storages(ens)) == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one module"):
        Ensemble([])
    with pytest.raises(TypeError, match=r"member 1 must be a torch.nn.Module, got str"):
        Ensemble([nn.Linear(2, 2), "resnet20"])
    with pytest.raises(ValueError, match=r"unknown backend 'vmpa' \(did you mean 'vmap'\?\)"):
        Ensemble(small_members(), backend="vmpa")
    with pytest.raises(ValueError, match=r"unknown average 'logits' \(did you mean 'logit'\?\)"):
        Ensemble(small_members(), average="logits")
    with pytest.raises(ValueError, match="member 0 has uninitialised lazy parameters"):
        Ensemble([nn.LazyLinear(3)])


@pytest.mark.parametrize("backend", ["loop", *BATCHED])
def test_members_must_agree_on_the_classes(backend):
    members = [nn.Linear(4, classes) for classes in (3, 5, 3)]
    with pytest.raises(ValueError, match=r"same number of classes, got \[3, 5, 3\]"):
        Ensemble(members, backend)(torch.rand(2, 4))


@pytest.mark.parametrize("backend", ["loop", *BATCHED])
def test_members_must_return_logits(backend):
    with pytest.raises(ValueError, match=r"member 0 must return logits \(B, K\), got \(2, 3, 5\)"):
        Ensemble([nn.Linear(4, 5), nn.Linear(4, 5)], backend)(torch.rand(2, 3, 4))


def test_members_without_parameters_run():
    x = torch.rand(2, 4)
    assert torch.equal(Ensemble([nn.Identity(), nn.Identity()], "vmap").member_logits(x), torch.stack([x, x]))


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_a_graph_made_before_freezing_still_reaches_the_parameters(backend):
    ens, plain = Ensemble(small_members(), backend), Ensemble(small_members(), backend)
    loss = ens.member_logits(images()).square().sum()
    with frozen(ens):
        ens(images())
    loss.backward()
    plain.member_logits(images()).square().sum().backward()
    for parameter, expected in zip(ens.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_members_that_first_ran_in_inference_mode_can_be_trained():
    ensemble = Ensemble(small_members(), backend="vmap").eval()
    with torch.inference_mode():
        ensemble(images())
    before = [parameter.detach().clone() for parameter in ensemble.parameters()]
    optimizer = torch.optim.SGD(ensemble.parameters(), 0.1)
    ensemble.train().member_logits(images()).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, ensemble.parameters()))
