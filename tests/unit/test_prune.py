"""`prune`: what is chosen, what each option does, what stays as it was, what is refused. Counts and identities are in the laws."""

import copy
import logging
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyn.nn.adapter_modules import Bottleneck, Fusion, LoRA, Prefix
from dyn.nn.masking import PRUNING, dense_weights, large_sparse, mask_hash, masks, prune


class Host(nn.Module):
    """Two frozen layers, each with a bottleneck under two names; a LoRA, a prefix of values and a fusion on top; a head."""

    def __init__(self, init="bert", d=12, r=8, norm="none", kinds=("bottleneck", "lora", "prefix", "fusion")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(d, d).requires_grad_(False) for _ in range(2))
        self.one = nn.ModuleList(Bottleneck(d, r, norm=norm, adapter_name="one") for _ in range(2) if "bottleneck" in kinds)
        self.two = nn.ModuleList(Bottleneck(d, r, adapter_name="two") for _ in range(2) if "bottleneck" in kinds)
        self.lora = LoRA(d, d, 4, scaling=2.0, adapter_name="one") if "lora" in kinds else None
        self.prefix = Prefix(d, 3, adapter_name="one") if "prefix" in kinds else None
        self.fusion = Fusion(d, ("one", "two"), adapter_name="both") if "fusion" in kinds else None
        self.drop, self.norm, self.head = nn.Dropout(0.5), nn.BatchNorm1d(d), nn.Linear(d, 3)
        for module in (*self.one, *self.two, self.lora, self.prefix, self.fusion):
            if module is not None:
                module.draw(init)

    def forward(self, x):
        for layer, one, two in zip(self.layers, self.one or [lambda x: 0] * 2, self.two or [lambda x: 0] * 2, strict=True):
            h = layer(x).tanh()
            x = h + one(h) + two(h)
        x = x if self.lora is None else x + self.lora(x)
        if self.prefix is not None:
            key, value = self.prefix()
            x = x + (x @ key.T).softmax(-1) @ value
        x = x if self.fusion is None else self.fusion(x, (x, x.tanh()))
        return self.head(self.drop(self.norm(x)))


def data(sizes=(6, 4)):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 12, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="sum")


def kept(model):
    return sum(int(m.sum()) for m in masks(model).values())


def test_what_is_pruned_by_default():
    model = prune(Host(), data(), loss)
    found = masks(model)
    assert set(found) == {f"{name}.{i}.{w}.weight" for name in ("one", "two") for i in (0, 1) for w in ("down", "up")} | {"lora.A.weight", "lora.B.weight"}
    total = 8 * 96 + 2 * 48
    assert kept(model) == total - round(0.4 * total) and all(p.grad is None for p in model.parameters())


def test_options_of_the_pool():
    assert {k.split(".")[0] for k in masks(prune(Host(), data(), loss, name="two"))} == {"two"}
    named = masks(prune(Host(), data(), loss, name="one", prefix=True, biases=True))
    assert {"prefix.key", "prefix.value", "one.1.up.bias", "lora.A.weight"} <= set(named) and not any("two" in k or "fusion" in k for k in named)
    assert set(masks(prune(Host(), data(), loss, name="both", fusion=True))) == {f"fusion.{w}.weight" for w in ("query", "key", "value")}
    anything = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)), [torch.randn(2, 3, 3, 3)], lambda m, x: m(x).square().sum(),
                     params=r"weight$")
    assert set(masks(anything)) == {"0.weight", "3.weight"} and "mask" in anything[0]._buffers


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("scope", ["global", "local", "erdos_renyi"])
def test_every_method_in_every_scope_disturbs_nothing(method, scope):
    if method == "erdos_renyi" and scope == "local":
        pytest.skip("refused")
    model = Host().to(torch.bfloat16)
    model.norm.float()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, modes, state = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    batches = [(x.bfloat16(), y) for x, y in data()]

    def in_float32(m, batch):
        assert {p.dtype for p in m.parameters()} == {torch.float32} and not m.training
        return loss(m, (batch[0].float(), batch[1]))

    prune(model, batches, in_float32, method, keep=0.5, scope=scope)
    found = masks(model)
    for key, value in model.state_dict().items():
        if not key.endswith("mask"):
            assert torch.equal(value, torch.where(found[key], before[key], 0) if key in found else before[key]) and value.dtype == before[key].dtype
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert model.head.weight.grad.eq(1).all() and all(p.grad is None for k, p in model.named_parameters() if k != "head.weight")
    again = Host().to(torch.bfloat16)
    again.norm.float()
    assert mask_hash(masks(prune(again, batches, in_float32, method, keep=0.5, scope=scope))) == mask_hash(found)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "magnitude"])
def test_a_zero_up_projection_gets_a_stand_in_and_is_zero_again(method, caplog):
    model = Host("zero_up", kinds=("bottleneck", "lora"))
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        prune(model, data(), loss, method, keep=0.6)
    assert "5 of 10 tensors (one.0.up.weight, ...) are zero" in caplog.text
    found = masks(model)
    total = sum(m.numel() for m in found.values())
    assert kept(model) == total - round(0.4 * total)
    assert all(m.any() and not m.all() for m in found.values()), "neither matrix of a pair is all kept or all gone"
    assert all(torch.equal(model.get_parameter(k), torch.where(m, before[k], 0)) for k, m in found.items())
    assert not model.lora.B.weight.any() and model.lora.B.weight.signbit().any().logical_not()


def test_layer_norm_does_not_blind_synflow():
    """Golden fact 31: through the norm, ones would become zeros."""
    found = masks(prune(Host(norm="in", kinds=("bottleneck",)), None, None, "synflow", keep=0.5))
    assert all(m.any() and not m.all() for m in found.values())


def test_synflow_of_a_block_by_hand():
    model = Bottleneck(5, 3, norm="out", scale=-2.0)
    model.draw("bert", torch.Generator().manual_seed(0))
    down, up = (w.detach().abs() for w in (model.down.weight, model.up.weight))
    scores = torch.cat([(down * up.sum(0)[:, None]).flatten(), (up * down.sum(1)).flatten()])
    expected = torch.zeros(30, dtype=torch.bool)
    expected[scores.topk(12).indices] = True
    prune(model, None, None, "synflow", keep=0.4)
    assert torch.equal(torch.cat([m.flatten() for m in masks(model).values()]), expected)


def test_synflow_of_a_cnn_takes_ones_in_the_shape_of_the_first_batch():
    seen = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prune(net, [torch.randn(2, 3, 5, 5)], None, "synflow", params="weight")
    assert seen[0].eq(1).all() and seen[0].shape == (2, 3, 5, 5) and len(seen) == 1


def test_rounds_are_nested_and_end_at_the_budget():
    one, three = (masks(prune(Host(), data(), loss, keep=0.2, rounds=n)) for n in (1, 3))
    assert mask_hash(one) != mask_hash(three) and sum(m.sum() for m in one.values()) == sum(m.sum() for m in three.values())
    twice = prune(prune(Host(), data(), loss, keep=0.5), data(), loss, keep=0.2)
    first = masks(prune(Host(), data(), loss, keep=0.5))
    assert kept(twice) == int(sum(m.sum() for m in three.values())) and all((m <= first[k]).all() for k, m in masks(twice).items())
    linear = masks(prune(Host(), data(), loss, keep=0.2, rounds=3, schedule="linear"))
    assert mask_hash(linear) != mask_hash(three)


def test_revival_scores_what_is_out_by_its_weight_before():
    """Magnitude ranks the same in every round: out of a masked network it would keep what the first round kept, by chance or not."""
    plain = masks(prune(Host(), data(), loss, "magnitude", keep=0.3))
    assert mask_hash(masks(prune(Host(), data(), loss, "magnitude", keep=0.3, rounds=4, monotone=False))) == mask_hash(plain)
    rounds = []

    def counting(m, batch):
        rounds.append(int(sum((p == 0).sum() for p in m.parameters() if p.ndim == 2)))
        return loss(m, batch)

    revived = prune(Host(), data((6,)), counting, keep=0.3, rounds=4, monotone=False)
    assert rounds == sorted(rounds) and len(set(rounds)) == 4
    assert mask_hash(masks(revived)) != mask_hash(masks(prune(Host(), data((6,)), loss, keep=0.3, rounds=4)))
    assert all(revived.get_parameter(k)[m].all() for k, m in masks(revived).items())


def test_samples_are_counted_and_clipped(caplog):
    def used(samples, batches):
        read = []
        with caplog.at_level(logging.WARNING):
            prune(Host(kinds=("lora",)), batches, lambda m, b: (read.append(len(b[0])), loss(m, b))[1], keep=0.5, samples=samples)
        return read

    assert used(5, iter(data((4, 4, 4)))) == [4, 4] and not caplog.text
    assert used(320, data((4, 2))) == [4, 2] and "samples=320 are asked for, the data have 6: all of them are used" in caplog.text
    with pytest.raises(ValueError, match="list has none"):
        prune(Host(), [[]], loss, samples=2)


def test_the_shuffled_twin_keeps_counts_by_tensor():
    found, twin = (masks(prune(Host(), data(), loss, shuffle=s)) for s in (None, "within_tensor"))
    assert {k: int(m.sum()) for k, m in found.items()} == {k: int(m.sum()) for k, m in twin.items()} and mask_hash(found) != mask_hash(twin)


def test_random_masks_do_not_depend_on_weights_of_the_same_seed():
    torch.manual_seed(0)
    block = Bottleneck(64, 64)
    block.draw("bert")
    prune(block, None, None, "random", keep=0.5, seed=0)
    kept_weights = [w[m] for w, m in zip(dense_weights(block).values(), masks(block).values(), strict=True)]
    assert all(w.std().item() == pytest.approx(0.02, rel=0.06) and abs(w.mean()) < 2e-3 for w in kept_weights)


def test_keep_one_is_the_dense_adapter():
    for whole in (1.0, 1, Fraction(1)):
        model = prune(Host(), keep=whole)
        assert all(m.all() for m in masks(model).values())
        assert all(torch.equal(w, Host().get_parameter(k)) for k, w in dense_weights(model).items())


@pytest.mark.parametrize("form", ["mask", "flat", "unit"])
def test_rescaled_survivors(form):
    plain, scaled = (prune(Host(kinds=("bottleneck",)), data(), loss, keep=0.25, form=form, rescale=r) for r in (False, True))
    for i in (0, 1):
        one, two = plain.get_parameter(f"one.{i}.up.weight").flatten(), scaled.get_parameter(f"one.{i}.up.weight").flatten()
        share = (one != 0).sum() / 96
        torch.testing.assert_close(two, one * share**-0.5)


def test_what_was_pruned_before_is_not_made_up_for_again():
    once, twice = Host(kinds=("bottleneck",)), Host(kinds=("bottleneck",))
    prune(once, None, None, "magnitude", keep=0.25, scope="local", rescale=True)
    for keep in (0.5, 0.25):
        prune(twice, None, None, "magnitude", keep=keep, scope="local", rescale=True)
    torch.testing.assert_close(dense_weights(twice), dense_weights(once))


@pytest.mark.parametrize(("settings", "words"), [
    (dict(keep=0.0), r"keep=0\.0 must be a share in \(0, 1\]"), (dict(keep=1.5), r"keep=1\.5 must be"), (dict(keep=-0.2), "must be a share"),
    (dict(keep=2), "keep=2 must be a share"), (dict(keep=float("nan")), "keep=nan must be"), (dict(keep=True), "keep=True must be"),
    (dict(keep="0.5"), "keep='0.5' must be"), (dict(keep=0.0001), r"keep=0\.0001 of 864 positions keeps none"),
    (dict(method="wanda"), "method='wanda' is unknown; allowed: random, magnitude, snip, grasp, synflow, erdos_renyi"),
    (dict(form="csr"), "form='csr' is unknown; allowed: mask, flat, unit, 2:4"), (dict(scope="layer"), "scope='layer' is unknown"),
    (dict(shuffle=True), "shuffle=True is unknown"), (dict(method="erdos_renyi", scope="local"), "contradicts it"),
    (dict(name="three"), "there is no adapter 'three'; attached: both, one, two"), (dict(name="both"), "kind fusion have no weight that is pruned by default"),
    (dict(batches={"x": data()}), "batches must be an iterable of batches, got dict"), (dict(batches=3), "batches must be an iterable of batches, got int"),
    (dict(batches=None), "looks at data, and there are no batches"), (dict(batches=[]), "looks at data"),
    (dict(loss_fn=None), r"method='snip' looks at a loss; give loss_fn"), (dict(params="nothing"), "finds no parameter of Host"),
    (dict(loss_fn=lambda m, b: loss(m, b) * 0), "all snip scores are 0"), (dict(loss_fn=lambda m, b: loss(m, b) * float("inf")), "finite scalar"),
    (dict(method="grasp", loss_fn=lambda m, b: loss(m, b) * 0), "all grasp scores are 0"), (dict(samples=0), "samples=0 must be 1 or more"),
    (dict(rounds=0), "rounds=0 must be an integer, at least 1"), (dict(form="2:4", keep=0.6), "keeps exactly half"),
    (dict(form="2:4", rounds=2, keep=0.5), "without rounds"),
    (dict(form="unit", prefix=True), r"adapters of kind 'prefix' \(prefix\) do not have"), (dict(form="unit", biases=True), "cannot be chosen by itself"),
    (dict(form="unit", params="head.weight"), "params=... names other weights"),
])
def test_refusals_leave_the_model_as_it_was(settings, words):
    model = Host()
    before, modes = copy.deepcopy(model.state_dict()), model.training
    with pytest.raises(ValueError, match=words):
        prune(model, **dict(batches=data(), loss_fn=loss) | settings)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items()) and model.training is modes


def test_processes_that_disagree_are_refused(monkeypatch):
    """Two processes that started from other weights."""
    model = Host()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda hashes, mine: hashes.__setitem__(slice(0, 2), [mine, "another"]))
    with pytest.raises(ValueError, match=r"processes found different masks \([0-9a-f]{16}, another\); all must start from the same weights and seed"):
        prune(model, data(), loss)
    assert not masks(model)


def test_tensors_that_no_gradient_reaches_are_said(caplog):
    model = Host(kinds=("bottleneck",))
    model.two[0].down.bias.data.fill_(-1e3)  # no unit is ever on
    with caplog.at_level(logging.WARNING):
        prune(model, data(), loss, scope="local", keep=0.5)
    assert "in 2 of 8 tensors (two.0.down.weight, ...) all snip scores are equal" in caplog.text


def test_a_bottleneck_may_lose_all_its_units():
    model = Host(kinds=("bottleneck",))
    model.one[0].up.weight.data.mul_(1e-6)
    prune(model, data(), loss, "magnitude", keep=0.4, form="unit")
    assert model.one[0].down.weight.shape == (0, 12) and model.one[0].up.weight.shape == (12, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        loss(model, data()[0]).backward()
        optimizer.step()
    assert model.one[0].up.bias.any()


def test_other_refusals():
    with pytest.raises(ValueError, match=r"prune: Linear has no adapter; attach one first, or say with params=\.\.\."):
        prune(nn.Linear(3, 3), keep=0.5, method="random")
    odd = Bottleneck(8, 10)
    odd.draw("bert")
    with pytest.raises(ValueError, match=r"up\.weight \[8, 10\].* 4 does not divide 10; take a bottleneck r of 8 or 12"):
        prune(odd, None, None, "magnitude", form="2:4")
    flat = prune(Host(), None, None, "random", form="flat")
    with pytest.raises(ValueError, match="is in flat form already; first set_masks"):
        prune(flat, None, None, "random", keep=0.2)
    with pytest.raises(ValueError, match="is masked already"):
        prune(prune(Host(), None, None, "random"), None, None, "random", form="unit", keep=0.2)
    with pytest.raises(ValueError, match="positions are left, and pruned ones do not come back"):
        prune(prune(Host(), None, None, "random"), None, None, "random", keep=1.0)
    with pytest.raises(ValueError, match="monotone=False ranks positions that are pruned already"):
        prune(prune(Host(), None, None, "random"), data(), loss, keep=0.2, monotone=False)


@pytest.mark.parametrize(("r", "factor", "words"), [
    (64.5, 1, "their product whole"), (64, 0.5, "factor"), (0, 2, "r must be 1"), (10, Fraction(4, 3), "their product whole")])
def test_large_sparse_refuses(r, factor, words):
    with pytest.raises(ValueError, match=words):
        large_sparse(r, factor)
