"""What only a GPU shows: graphs of every op, streams, tensors beyond 32-bit indices, and equality with the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny_training import tiny_config, train
from torch import nn

from ceat_fast import Ensemble
from ceat_fast.attacks import MIM, PGD, AutoAttack, keyed_uniform
from ceat_fast.ensemble import tune
from ceat_fast.ensemble.graphs import beside, capture
from ceat_fast.loss import ceat_loss, ensemble_cross_entropy
from ceat_fast.methods import CEAT, EAT
from ceat_fast.models import digits_resnet
from ceat_fast.ops import dispatch
from ceat_fast.ops.convolution import MemberWeights
from ceat_fast.ops.reference import REDUCTIONS, CeatSettings, pgd_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

IMPLS = ("native", "triton", "torch")
CUDA = torch.device("cuda")
SETTINGS = CeatSettings(1.0, 1.0, 5.0, 1.0, 5.0, float("inf"), 0, 1, False)


def logits(seed, shape=(3, 40, 10), dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return 3 * torch.randn(shape, device=CUDA, dtype=dtype, generator=generator)


def labels(seed, samples=40, classes=10):
    return torch.randint(classes, (samples,), device=CUDA, generator=torch.Generator("cuda").manual_seed(seed))


def loss_and_gradients(impl):
    def call(adv, nat, target):
        adv, nat = adv.detach().requires_grad_(), nat.detach().requires_grad_()
        loss = ceat_loss(adv, nat, target, impl=impl)
        return (loss, *torch.autograd.grad(loss.sum(), (adv, nat)))

    return call, lambda seed: (logits(seed), logits(seed + 100), labels(seed))


def attack_loss_and_gradient(impl):
    def call(z, target):
        z = z.detach().requires_grad_()
        loss = ensemble_cross_entropy(z, target, impl=impl)
        return (loss, *torch.autograd.grad(loss, z))

    return call, lambda seed: (logits(seed), labels(seed))


def step(impl):
    def call(x_adv, grad, x):
        return (dispatch.pgd_step(x_adv, grad, x, 0.01, 0.03, impl=impl),)

    def inputs(seed):
        x = logits(seed, (4, 3, 8, 8)).sigmoid()
        return (x + 0.02).clamp(0, 1), logits(seed + 1, x.shape), x

    return call, inputs


def noise(_):
    def call(index, seed):
        return (keyed_uniform(index, (3, 5), (seed, 7), torch.float32),)

    return call, lambda seed: (torch.arange(seed, seed + 9, device=CUDA), torch.tensor(seed, device=CUDA))


def convolution(impl):
    dtype = torch.bfloat16 if impl == "native" else torch.float32

    def call(x, weight, bias, other):
        weights = MemberWeights(weight, bias, 1)
        return weights.convolve(x, other, relu=True), weights.input_gradient(x, 8, 8, other, gate=other)

    def inputs(seed):
        x = logits(seed, (3, 2, 8, 8, 16), dtype)
        weight, bias = logits(seed + 1, (3, 16, 3, 3, 16), dtype) / 12, logits(seed + 2, (3, 16), dtype)
        return x, weight, bias, x * 0.5

    return call, inputs


OPS = [
    *((op, impl) for op in (loss_and_gradients, attack_loss_and_gradient, step) for impl in IMPLS),
    (noise, "torch"),
    (convolution, "native"),
    (convolution, "triton"),
]
every_op = pytest.mark.parametrize(("op", "impl"), OPS, ids=lambda value: getattr(value, "__name__", value))


def equal(got, right):
    assert len(got) == len(right)
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)


@every_op
def test_captured_and_replayed_on_other_inputs(op, impl):
    call, inputs = op(impl)
    places = [tensor.clone() for tensor in inputs(0)]
    for _ in range(2):
        beside(lambda: call(*places), CUDA)
    replay = capture(lambda: call(*places))
    for seed in (1, 2, 3):
        for place, value in zip(places, inputs(seed), strict=True):
            place.copy_(value)
        equal(replay(), call(*inputs(seed)))


@every_op
def test_on_another_stream_and_on_two_at_once(op, impl):
    call, inputs = op(impl)
    right = [call(*inputs(seed)) for seed in range(8)]
    given = [inputs(seed) for seed in range(8)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for seed, arguments in enumerate(given):
        with torch.cuda.stream(streams[seed % 2]):
            got.append(call(*arguments))
    torch.cuda.synchronize()
    for a, b in zip(got, right, strict=True):
        equal(a, b)


def needs_gigabytes(count):
    if torch.cuda.mem_get_info()[0] < count * 2**30:
        pytest.skip(f"needs {count} GiB of free memory on the GPU")


# Both kernels in one test: workers side by side would need the memory twice.
def test_steps_beyond_32_bit_indices():
    needs_gigabytes(35)
    size = 2**31 + 1000
    x = torch.rand(size, device=CUDA)
    grad = torch.rand(size, device=CUDA, dtype=torch.bfloat16).sub_(0.5)
    for impl in ("native", "triton"):
        out = dispatch.pgd_step(x, grad, x, 0.01, 0.03, impl=impl)
        for part in (slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(size - 500, size)):
            assert torch.equal(out[part], pgd_step(x[part], grad[part], x[part], 0.01, 0.03))
        del out


def test_loss_beyond_32_bit_indices():
    needs_gigabytes(35)
    members, samples, classes = 3, 720_000, 1000  # 2.16e9 logits
    adv = torch.randn(members, samples, classes, device=CUDA, dtype=torch.bfloat16)
    nat = adv.roll(1, 0)
    target = labels(0, samples, classes)
    settings = SETTINGS._replace(reduction=REDUCTIONS.index("none"))
    reference = dispatch.module(dispatch.backend_name("torch", "cuda"))
    for impl in ("native", "triton"):
        module = dispatch.module(dispatch.backend_name(impl, "cuda"))
        outputs = module.ceat_loss(adv, nat, target, settings, True, False)[:3]
        for part in (slice(0, 50), slice(samples - 50, samples)):
            right = reference.ceat_loss(adv[:, part], nat[:, part], target[part], settings, True, False)
            for got, expected in zip(outputs, right, strict=False):
                torch.testing.assert_close(got[:, part].float(), expected.float(), rtol=1e-2, atol=1e-4)
        del outputs


def models(count=3):
    torch.manual_seed(0)
    return [digits_resnet().double().eval() for _ in range(count)]


def images(count=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("backend", ["loop", "vmap", "streams", "loop+graph", "vmap+graph", "streams+graph"])
@pytest.mark.parametrize("goal", ["ensemble", "members"])
def test_attacks_as_on_the_cpu(backend, goal):
    x, y = images()
    for attack in (
        PGD(0.1, 0.02, 5, seed=3, goal=goal, restarts=2),
        PGD(1.0, 0.2, 5, seed=3, goal=goal, norm="L2", loss="margin"),
        MIM(0.1, 0.02, 5, seed=3, goal=goal),
    ):
        right = attack(Ensemble(models(), "loop").eval(), x, y)
        found = attack(Ensemble(models(), backend).cuda().eval(), x.cuda(), y.cuda())
        torch.testing.assert_close(found.cpu(), right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["loop+graph", "vmap+graph", "streams+graph"])
@pytest.mark.parametrize("goal", ["ensemble", "members"])
def test_whole_searches_in_a_graph_as_on_the_cpu(backend, goal):
    plain, graphed = Ensemble(models(), "loop"), Ensemble(models(), backend).cuda()
    for turn in range(5):  # two to warm up, then replays on other inputs, seeds and weights
        x, y = images()
        x = x.roll(turn, 0)
        attack = PGD(0.1, 0.02, 5, seed=turn, goal=goal)
        right, found = attack.perturb(plain, x, y), attack.perturb(graphed, x.cuda(), y.cuda())
        torch.testing.assert_close(found.cpu(), right, rtol=0, atol=1e-9)
        with torch.no_grad():
            for ensemble in (plain, graphed):
                ensemble.members[1].fc.weight.mul_(0.9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_searches_of_fused_members_in_a_graph_follow_the_weights(precision):
    torch.manual_seed(0)
    members = [digits_resnet().cuda().eval() for _ in range(2)]
    plain, graphed = Ensemble(members, "fused"), Ensemble(members, "fused+graph")
    x, y = (tensor.cuda() for tensor in images())
    for turn in range(5):
        attack = PGD(0.1, 0.02, 5, seed=turn, precision=precision)
        found, right = (attack.perturb(ensemble, x.float(), y) for ensemble in (graphed, plain))
        assert torch.equal(found, right)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(0.7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tuning_for_captured_steps(precision):
    ensemble = Ensemble([model.float() for model in models()]).cuda().train()
    x = images(32)[0].float().cuda()
    settings = {"precision": precision, "training_precision": precision, "captured": True}
    chosen = tune(ensemble, x, **settings, remember=False)
    assert not any(execution.graph for execution in chosen)
    torch.cuda.synchronize()


@pytest.mark.parametrize("backend", ["vmap", "auto"])
def test_autoattack_flags_as_on_the_cpu(backend):
    x, y = images(24)
    attacks = ("apgd-ce", "apgd-t", "fab-t", "square")
    attack = AutoAttack("4/255", version="custom", attacks=attacks, steps=10, queries=50, seed=0)
    right = attack.run(Ensemble(models(), "loop").eval(), x, y)
    found = attack.run(Ensemble(models(), backend).cuda().eval(), x.cuda(), y.cuda())
    assert torch.equal(found.fooled.cpu(), right.fooled)


class WaitsForTheDevice(nn.Module):
    """Its passes cannot be captured."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * float(x.flatten()[0].isfinite())


def test_autoattack_on_members_that_no_graph_can_hold():
    x, y = images(24)
    attack = AutoAttack("4/255", version="custom", attacks=("apgd-ce", "square"), steps=5, queries=20, seed=0)
    members = [WaitsForTheDevice(model) for model in models()]
    right = attack.run(Ensemble(models(), "loop").eval(), x, y)
    found = attack.run(Ensemble(members).cuda().eval(), x.cuda(), y.cuda())
    assert torch.equal(found.fooled.cpu(), right.fooled)


@pytest.mark.parametrize("method", [CEAT(), EAT()], ids=["CEAT", "EAT"])
@pytest.mark.parametrize("cuda_graph", ["on", "off"])
def test_training_as_on_the_cpu(tmp_path, method, cuda_graph):
    cpu = train(tiny_config(tmp_path / "cpu", method=method))
    gpu = train(tiny_config(tmp_path / "gpu", method=method, device="cuda", cuda_graph=cuda_graph))
    for a, b in zip(cpu.records, gpu.records, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(tmp_path, precision):
    trainer = train(tiny_config(tmp_path, device="cuda", precision=precision))
    assert trainer.records[-1]["loss"] < trainer.records[0]["loss"]
