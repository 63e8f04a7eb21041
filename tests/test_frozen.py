"""The view that attacks see: the same function, without side effects, in any precision, for any module."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ceat_fast.attacks import PGD
from ceat_fast.ensemble import Ensemble, frozen, resolve_precision, unfolded
from ceat_fast.models import digits_resnet, resnet20


class Net(nn.Module):
    """Every case of folding: plain, biased, grouped, used by two, before the convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(4, affine=False, eps=0.3)
        self.pre = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.shared_input = nn.BatchNorm2d(4)
        self.conv4 = nn.Conv2d(4, 4, 1)
        self.twice = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.conv3(F.relu(self.pre(self.bn2(self.conv2(x)))))
        x = x + self.shared_input(x)
        x = self.twice(self.conv4(x)) + self.twice(x)
        return self.fc(x.mean((2, 3)))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = Net(), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def lived_in(module):
    """Weights and statistics as after some training, in float64, so that folding has to be exact."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)
    return module


def inputs(batch=3, size=5):
    return torch.rand(batch, 2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_view_is_the_same_function_in_eval_mode():
    model = lived_in(Net())
    with torch.no_grad(), frozen(model) as view:
        folded = view(inputs())
        assert view is not model
    torch.testing.assert_close(folded, model.eval()(inputs()), rtol=1e-12, atol=1e-12)


def test_what_is_folded_and_what_is_not():
    model = Net()
    with frozen(model) as view:
        norms = [name.split(".")[-1] for name, child in view.named_modules() if isinstance(child, nn.BatchNorm2d)]
    assert norms == ["pre", "shared_input", "twice"]
    assert [line.split(": ")[1] for line in unfolded(model)] == norms
    assert unfolded(resnet20()) == []


def test_the_model_itself_is_never_touched():
    model = Ensemble([lived_in(Net()), lived_in(Net())]).train()
    model.members[0].bn1.eval()
    model.members[1].fc.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    with frozen(model) as view:
        assert isinstance(view, Ensemble)
        assert not any(module.training for module in view.modules())
        assert not any(p.requires_grad for p in view.parameters())
        assert not view(inputs()).requires_grad
        assert modes == [module.training for module in model.modules()]
    assert modes == [module.training for module in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_module_that_runs_itself_is_put_back_also_after_an_exception():
    model = Counting().train()
    model.net.fc.weight.requires_grad_(False)
    with frozen(model) as view:
        assert view is model
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["net.fc.weight"]


@pytest.mark.parametrize("change", ["step", "data", "statistics"])
def test_the_view_follows_the_weights(change):
    model = lived_in(Net())
    with frozen(model) as view:
        first = view
    with torch.no_grad():
        if change == "step":
            for p in model.parameters():
                p.add_(0.1)
        elif change == "data":  # leaves no trace in the version counter
            model.conv1.weight.data = model.conv1.weight.data * 2
        else:
            model.train()(inputs())
    with torch.no_grad(), frozen(model) as view:
        assert view is first
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)


def test_surgery_makes_a_new_view():
    model = lived_in(Net())
    with frozen(model):
        pass
    model.conv3 = lived_in(nn.Conv2d(4, 4, 3, padding=1))
    model.bn1.eps = 0.5
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)


def test_a_changed_attribute_makes_a_new_view():
    model = lived_in(Net())
    with frozen(model):
        pass
    model.conv3.stride = (2, 2)
    model.bn1.eps = 0.5
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)


def test_a_changed_ensemble_makes_a_new_view():
    model = Ensemble([lived_in(Net()), lived_in(Net())])
    with frozen(model):
        pass
    model.members[1] = lived_in(digits_resnet(3, in_channels=2))
    model.average = "logit"
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)


def test_hooks_see_the_attack():
    model, seen = Net(), []
    model.conv1.register_forward_hook(lambda *_: seen.append(1))
    with frozen(model) as view:
        view(inputs().float())
    assert view is model
    assert seen == [1]
    assert unfolded(model) == ["Net: conv1 has hooks"]


def test_a_hook_registered_later_sees_the_attack():
    model, seen = Net(), []
    with frozen(model):
        pass
    model.conv1.register_forward_hook(lambda *_: seen.append(1))
    with frozen(model) as view:
        view(inputs().float())
    assert seen == [1]


def test_a_forward_with_side_effects_runs_itself():
    model = Counting()
    with frozen(model) as view:
        view(inputs().float())
    assert model.calls == 1


def test_a_forward_that_cannot_be_traced_runs_unfolded():
    model = lived_in(Untraceable())
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)
    (line,) = unfolded(model)
    assert line.startswith("Untraceable: bn: torch.fx cannot trace")


def test_an_instance_forward_and_a_subclass_are_respected():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = lived_in(Net())
    model.bn1 = lived_in(Doubled(4))
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)
    model.conv3.forward = lambda x: x * 0
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)


def test_tied_weights_stay_right():
    model = lived_in(Net())
    model.conv4.weight = model.conv3.weight
    with frozen(model):
        pass
    model.conv3.weight.data.add_(1)
    with torch.no_grad(), frozen(model) as view:
        torch.testing.assert_close(view(inputs()), model.eval()(inputs()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.2), ("fp16", 0.1)])
@pytest.mark.parametrize("as_ensemble", [False, True])
def test_low_precision_has_fp32_logits_near_the_model(precision, bound, as_ensemble):
    torch.manual_seed(0)
    model = Ensemble([digits_resnet(), digits_resnet()]) if as_ensemble else digits_resnet()
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    with frozen(model, precision) as view:
        logits = view(x)
        (grad,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert logits.dtype == grad.dtype == torch.float32
    exact = model.eval()(x)
    (exact_grad,) = torch.autograd.grad(exact[:, 0].sum(), x)
    assert 0 < (logits - exact).abs().max() < bound * exact.abs().max()
    assert 0 < (grad - exact_grad).norm() < bound * exact_grad.norm()


@pytest.mark.parametrize("average", ["prob", "logit"])
def test_low_precision_averages_as_the_model_does(average: str) -> None:
    torch.manual_seed(0)
    model = Ensemble([nn.Linear(4, 3) for _ in range(2)], average=average).eval()
    x = 9 * torch.randn(5, 4)
    with torch.no_grad(), frozen(model, "bf16") as view:
        torch.testing.assert_close(view(x), model(x), rtol=0, atol=0.1)


def test_batch_statistics_are_those_of_the_batch():
    model = lived_in(Net())
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad(), frozen(model, bn_mode="batch") as view:
        logits = view(inputs())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits, model.train()(inputs()), rtol=1e-12, atol=1e-12)


def test_refusals_name_the_argument():
    model = Counting()
    with pytest.raises(ValueError, match="unknown precision 'fp8'"), frozen(model, "fp8"):
        pass
    with pytest.raises(ValueError, match="unknown bn_mode 'train'"), frozen(model, bn_mode="train"):
        pass
    with pytest.raises(ValueError, match=r"bfloat16 needs a copy of the model, but Counting cannot be copied"):
        frozen(model, "bf16").__enter__()


def test_auto_precision_depends_on_the_instructions(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", Net()) == "bf16"
    assert resolve_precision("auto", Net().double()) == "fp32"
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", Net()) == "fp32"


def test_views_do_not_keep_models_alive():
    for make in (Net, Counting, lambda: Ensemble([Net(), Net()])):
        model = make()
        with frozen(model):
            pass
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


def allocated_tensors(view: nn.Module) -> list[str]:
    return [name for name, tensor in view.state_dict().items() if tensor.untyped_storage().size()]


def test_a_view_takes_memory_only_while_it_is_in_use() -> None:
    ensemble = Ensemble([digits_resnet() for _ in range(2)]).eval()
    x = torch.rand(5, 1, 8, 8)
    with frozen(ensemble) as view:
        before = view(x)
        with frozen(ensemble) as again:
            assert again is view
        assert allocated_tensors(view) == list(view.state_dict())  # the outer block uses it still
    assert allocated_tensors(view) == []
    for stale in (view, view.members[0]):
        with pytest.raises(RuntimeError, match="outside of its `with` block"):
            stale(x)
    with frozen(ensemble) as view:
        assert torch.equal(view(x), before)
    with pytest.raises(ZeroDivisionError), frozen(ensemble) as view:
        raise ZeroDivisionError
    assert allocated_tensors(view) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plain_view_outside_of_its_block(precision: str) -> None:
    model, x = digits_resnet().eval(), torch.rand(5, 1, 8, 8)
    with frozen(model, precision) as view:
        before = view(x)
    with pytest.raises(RuntimeError, match="outside of its `with` block"):
        view(x)
    with frozen(model, precision) as view:
        assert torch.equal(view(x), before)


def test_settings_and_types_of_what_was_folded_make_a_new_view():
    def changed(change):
        model = lived_in(Net()).eval()
        with frozen(model):
            pass
        change(model)
        expected = model(inputs().to(next(model.parameters()).dtype))
        with frozen(model) as view:
            got = view(inputs().to(expected.dtype))
        torch.testing.assert_close(got, expected)

    changed(lambda model: setattr(model.bn1, "eps", 5.0))
    changed(lambda model: setattr(model, "bn1", nn.GroupNorm(2, 4).double().eval()))
    changed(lambda model: setattr(model, "bn1", nn.BatchNorm2d(4, track_running_stats=False).double().eval()))
    changed(lambda model: model.float())


def test_auto_precision_is_fp32_where_a_copy_is_impossible(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).eval()
    assert resolve_precision("auto", model) == "bf16"
    model.register_forward_hook(lambda module, args, output: output + 1)
    assert resolve_precision("auto", model) == "fp32"
    x = inputs().float()
    with frozen(model, "auto") as view:
        assert torch.equal(view(x), model(x))


def test_a_wrapped_ensemble_is_copied():
    model = nn.Sequential(nn.Identity(), Ensemble([lived_in(Net()), lived_in(Net())])).eval()
    expected = model(inputs())
    with frozen(model) as view:
        assert view is not model
        torch.testing.assert_close(view(inputs()), expected)
    assert Ensemble.runtime_attributes <= vars(model[1]).keys()


class ReadsWeights(nn.Module):
    """Uses what folding would change a second time, outside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        again = F.conv2d(1 - x, self.conv.weight, padding=1) / self.conv.bias.norm()
        return self.fc((self.bn(self.conv(x)) - again).mean((2, 3))) * self.bn.weight.mean()


def test_what_a_forward_reads_by_itself_is_not_folded():
    torch.manual_seed(0)
    model = ReadsWeights()
    nn.init.uniform_(model.bn.weight, 0.5, 2)
    for _ in range(3):
        model(torch.rand(8, 2, 6, 6))
    x = torch.rand(4, 2, 6, 6)
    with torch.no_grad(), frozen(model.eval()) as view:
        torch.testing.assert_close(view(x), model(x))
    assert "forward reads a tensor" in unfolded(model)[0]


def test_threads_attack_at_the_same_time():
    def attack(model: nn.Module) -> None:
        try:
            for _ in range(8):
                found.append(PGD(steps=3, seed=0)(model, x, y))
        except Exception as error:  # would end in the thread
            found.append(error)

    x, y = torch.rand(4, 1, 8, 8), torch.randint(0, 10, (4,))
    shared = Ensemble([digits_resnet() for _ in range(2)]).eval()
    expected = PGD(steps=3, seed=0)(shared, x, y)
    for models in ([shared] * 2, [Ensemble(list(copy.deepcopy(shared).members)).eval() for _ in range(2)]):
        found: list[object] = []
        threads = [threading.Thread(target=attack, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 16
        assert all(isinstance(result, torch.Tensor) and torch.equal(result, expected) for result in found), found


@pytest.mark.parametrize("how", ["subclass", "attribute"])
def test_an_ensemble_that_combines_in_its_own_way_is_attacked_as_such(how):
    class First(Ensemble):
        def combine(self, logits):
            return logits[0].log_softmax(-1)

    x, y = torch.rand(4, 1, 8, 8), torch.randint(0, 10, (4,))
    members = [digits_resnet() for _ in range(2)]
    model = (First if how == "subclass" else Ensemble)(members).eval()
    if how == "attribute":
        model.combine = lambda logits: logits[0].log_softmax(-1)
    attack = PGD(eps=0.1, alpha=0.03, steps=4, seed=0)
    torch.testing.assert_close(attack(model, x, y), attack(members[0], x, y))
