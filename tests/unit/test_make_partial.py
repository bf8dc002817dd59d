"""Iterative mode partition: exact counts, rounds, degeneracy, what it refuses and what it leaves untouched."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyn.core.partition import kept_count
from dyn.nn import partial as partial_module
from dyn.nn.bank import Banked
from dyn.nn.dynamic_conv import KINDS, set_temperature
from dyn.nn.partial import CRITERIA, PartialConv2d, compact, make_partial, settle, switches
from dyn.nn.surgery import count_parameters, dynamic_shares, make_dynamic

TOTAL = 8 * 4 * 9 + 8 * 4 * 9 + 10 * 8


def network(kind="dyconv", start="fresh", dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Dropout(0.3), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3))
    return make_dynamic(model, kind, start=start, reduction=1, **kwargs).to(dtype)  # wide attention: one hidden unit would be dead half of the time


def data(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 9, 9, generator=g).to(dtype), torch.randint(3, (n,), generator=g)) for n in (6, 5)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def masks(model):
    return {n: m.partial.mask for n, m in model.named_modules() if isinstance(m, Banked)}


def masks_equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(masks(model).values(), masks(other).values(), strict=True))


def dynamic(model):
    layers = [m for m in model.modules() if isinstance(m, Banked)]
    return sum(m.weight[0].numel() if m.partial.mask is None else int(m.partial.mask.sum()) for m in layers)


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("kind", ["dyconv", "condconv", "odconv"])
def test_counts_are_exact_for_every_criterion(method, kind):
    model = make_partial(network(kind), data(), loss, keep=0.3, method=method)
    assert dynamic(model) == kept_count(TOTAL, 0.3, "up")
    assert model(data()[0][0]).isfinite().all()


@pytest.mark.parametrize(("keep", "scope", "count"), [(0.5, "local", 144 + 144 + 40), (0.37, "global", kept_count(TOTAL, 0.37, "up")), (101, "global", 101),
                                                      (0.5, "erdos_renyi", TOTAL // 2)])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_budgets(keep, scope, count, schedule):
    assert dynamic(make_partial(network(), data(), loss, keep=keep, scope=scope, schedule=schedule, rounds=4)) == count


def test_none_and_all():
    """0 is the static network, the mean of the kernels; 1 is the dynamic one, which needs no scores."""
    images, start = data()[0][0], network().eval()
    nothing = make_partial(copy.deepcopy(start), None, None, keep=0.0)
    static = copy.deepcopy(start)
    for name, m in start.named_modules():
        if isinstance(m, Banked):
            conv = nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, groups=m.groups, bias=m.bias is not None)
            conv.weight.data = m.weight.data.mean(0)
            if m.bias is not None:
                conv.bias.data = m.bias.data[0]  # equal in all kernels here
            static.set_submodule(name, conv)
    torch.testing.assert_close(nothing(images), static(images), rtol=1e-4, atol=1e-5)
    everything = make_partial(copy.deepcopy(start), None, None, keep=1.0)
    torch.testing.assert_close(everything(images), start(images), rtol=0, atol=0)
    assert dynamic(nothing) == 0 and dynamic(everything) == TOTAL
    torch.testing.assert_close(compact(nothing)(images), nothing(images), rtol=1e-4, atol=1e-5)


def test_snip_keeps_the_largest_mode_switch_gradients():
    model = network(dtype=torch.float64)
    reference = copy.deepcopy(model)
    layers = {n: m for n, m in reference.named_modules() if isinstance(m, Banked)}
    for m in layers.values():
        m.add_partial()
        m.partial.hold(torch.ones_like(m.weight[0], dtype=torch.bool), m.weight.detach().mean(0))
    set_temperature(reference, 5.0)
    switch, _ = switches(reference, layers, data(torch.float64), loss)
    best = torch.cat([s.abs().flatten() for s in switch.values()]).topk(200).values[-1]
    make_partial(model, data(torch.float64), loss, keep=200, rounds=1, temperature=5.0)
    assert all(torch.equal(mask, switch[name].abs() >= best) for name, mask in masks(model).items())
    assert all(m.temperature == 31 for m in model.modules() if isinstance(m, Banked))


def test_rounds_are_monotone_unless_told():
    """Fact 30: recomputing the whole mask each round lets static positions come back, which the default forbids."""
    revived = {}
    for monotone in (True, False):
        seen, hold = [], partial_module.PartialBank.hold

        def spy(self, mask, *args, hold=hold, seen=seen, **kwargs):
            seen.append((id(self), mask.clone()))
            hold(self, mask, *args, **kwargs)

        partial_module.PartialBank.hold = spy
        try:
            model = make_partial(network(), data(), loss, keep=0.2, rounds=6, monotone=monotone, static="fresh")
        finally:
            partial_module.PartialBank.hold = hold
        by_layer = {}
        for key, mask in seen:
            by_layer.setdefault(key, []).append(mask)
        revived[monotone] = sum(int((later & ~earlier).sum()) for m in by_layer.values() for earlier, later in zip(m, m[1:], strict=False))
        assert dynamic(model) == kept_count(TOTAL, 0.2, "up")
    assert revived[True] == 0 < revived[False]


def test_every_round_scores_the_network_of_its_modes(monkeypatch):
    """What turned static in an earlier round is static while the next one scores, although its kernels are still there."""
    seen, score = [], partial_module.score

    def spy(model, *args, **kwargs):
        settled = copy.deepcopy(model)
        for m in settled.modules():
            if isinstance(m, Banked):
                m.partition(m.partial.mask, m.partial.static)
        with torch.no_grad():
            seen.append(torch.equal(model.eval()(data()[0][0]), settled.eval()(data()[0][0])))
        model.train()
        return score(model, *args, **kwargs)

    monkeypatch.setattr(partial_module, "score", spy)
    make_partial(network(), data(), loss, keep=0.3, method="grasp", rounds=3, static="fresh")
    assert seen == [True] * 3


def test_a_second_call_goes_on():
    model = make_partial(network(), data(), loss, keep=0.6)
    first, values = masks(copy.deepcopy(model)), {n: m.partial.static.clone() for n, m in model.named_modules() if isinstance(m, Banked)}
    make_partial(model, data(), loss, keep=0.2)
    assert dynamic(model) == kept_count(TOTAL, 0.2, "up")
    for name, m in ((n, m) for n, m in model.named_modules() if isinstance(m, Banked)):
        assert not (m.partial.mask & ~first[name]).any()
        assert torch.equal(m.partial.static[~first[name]], values[name][~first[name]])
    with pytest.raises(ValueError, match=r"keep=0.9 needs 591 of 656 positions, 132 are left"):
        make_partial(model, data(), loss, keep=0.9)
    with pytest.raises(ValueError, match="monotone=False ranks positions that are static already"):
        make_partial(model, data(), loss, keep=0.1, monotone=False)
    with pytest.raises(ValueError, match="shuffle moves positions that are static already"):
        make_partial(model, data(), loss, keep=0.1, shuffle="within_tensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_kernels_are_ranked_by_removal(dtype, caplog):
    """Fact 28: with kernels that are copies the mode switch changes nothing, and any threshold on it would make everything static."""
    model = network(start="copies", noise=0.0, dtype=dtype)
    reference = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        make_partial(model, data(dtype), loss, keep=0.3)
    assert "in 3 of 3 layers (3, ...) the parameter sets, or their weights, are so alike" in caplog.text and len(caplog.records) == 1
    make_partial(reference, data(dtype), loss, keep=0.3, method="removal")
    assert dynamic(model) == kept_count(TOTAL, 0.3, "up") and masks_equal(model, reference)


def test_copies_with_noise_are_not_taken_for_identical(caplog):
    for temperature in (1.0, 31.0):
        make_partial(network(start="copies", noise=0.01), data(), loss, keep=0.3, temperature=temperature)
    assert "removing" not in caplog.text


def test_one_blind_layer(caplog):
    """Attention that weighs all kernels of one layer alike: in one ranking its positions turn static first, with a budget of its own by removal."""
    def blind():
        model = network()
        nn.init.zeros_(model[6].attention.expand.weight)
        return model

    model = make_partial(blind(), data(), loss, keep=0.3)
    assert not model[6].partial.mask.any() and dynamic(model) == kept_count(TOTAL, 0.3, "up")
    assert "in 1 of 3 layers (6, ...)" in caplog.text and "turn static first" in caplog.text
    caplog.clear()
    one, other = (make_partial(blind(), data(), loss, keep=0.3, rounds=1, scope="local", method=method) for method in ("snip", "removal"))
    assert torch.equal(one[6].partial.mask, other[6].partial.mask) and not torch.equal(one[3].partial.mask, other[3].partial.mask)
    assert "in 1 of 3 layers (6, ...)" in caplog.text and "removing" in caplog.text


def test_layers_without_effect_are_told(caplog):
    """What starts at zero behind layers hides them from the loss: here a classifier, in timm's ResNets from scratch the last norm of every branch."""
    model = network()
    nn.init.zeros_(model[11].weight)
    with pytest.raises(ValueError, match="they say nothing"):
        make_partial(model, data(), loss, keep=0.3)
    assert "in 3 of 3 layers (3, ...) no position has any effect on the loss" in caplog.text


def test_scores_without_information_are_refused_and_nothing_changes():
    """Fact 29: all-zero scores must not make an all-static network."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="all snip scores are 0: they say nothing"):
        make_partial(model, data(), lambda m, b: 0 * loss(m, b), keep=0.3)
    with pytest.raises(ValueError, match="must return a finite scalar"):
        make_partial(model, data(), lambda m, b: loss(m, b) * torch.nan, keep=0.3)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all(m.partial is None for m in model.modules() if isinstance(m, Banked))
    partial = make_partial(network(), data(), loss, keep=0.6)
    before = copy.deepcopy(partial.state_dict())
    with pytest.raises(ValueError, match="they say nothing"):
        make_partial(partial, data(), lambda m, b: 0 * loss(m, b), keep=0.3)
    assert all(torch.equal(partial.state_dict()[k], before[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_short_precision_are_partitioned_on_batches_of_their_own(dtype):
    model = make_partial(network(dtype=dtype), data(dtype), loss, keep=0.3)
    wide = make_partial(network(dtype=dtype), data(), loss, keep=0.3)
    assert all(m.weight.dtype == dtype for m in model.modules() if isinstance(m, Banked)) and masks(model).keys() == masks(wide).keys()
    assert model.eval()(data(dtype)[0][0]).dtype == dtype


def test_a_compact_network_is_told_apart_from_a_static_one():
    small = compact(make_partial(network(), None, None, keep=0.3, method="random"))
    with pytest.raises(ValueError, match="make_partial: Sequential is compact already"):
        make_partial(small, data(), loss)
    with pytest.raises(ValueError, match="compact: Sequential is compact already"):
        compact(small)


def test_a_network_takes_another_ones_modes_and_weights():
    """Dead entries by the mask of the file, whatever mask was there."""
    theirs, ours, fresh = (network() for _ in range(3))
    make_partial(theirs, data(), loss, keep=0.3)
    make_partial(ours, None, None, keep=0.5, method="random", seed=7)
    fresh.load_state_dict(theirs.state_dict(), strict=False)
    for made in (ours, make_partial(fresh, None, None, keep=1.0)):
        made.load_state_dict(theirs.state_dict())
        assert masks_equal(made, theirs)
        x = data()[0][0]
        torch.testing.assert_close(made.eval()(x), theirs.eval()(x), rtol=0, atol=0)


def test_dead_entries_of_a_file_are_zeroed():
    model = make_partial(network(), None, None, keep=0.3, method="random")
    state = {key: value + 1.0 if key.endswith("weight") and value.ndim == 5 else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(not m.weight[:, ~m.partial.mask].any() and m.weight[:, m.partial.mask].all() for m in model.modules() if isinstance(m, Banked))


def test_a_second_call_that_a_layer_cannot_fill():
    model = make_partial(network(), data(), loss, keep=0.3)
    with pytest.raises(ValueError, match=r"keep=0.2 with scope=local: .* has \d+ positions left and should keep \d+"):
        make_partial(model, None, None, keep=0.2, scope="local", method="random", seed=3)


def test_dead_entries_that_somebody_moved_are_settled():
    model = make_partial(network(), data(), loss, keep=0.3).eval()
    before = model(data()[0][0])
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Banked):  # as an optimiser that mixes elements does
                m.weight.add_(~m.partial.mask)
                m.partial.static.add_(m.partial.mask)
    assert not torch.allclose(model(data()[0][0]), before)
    torch.testing.assert_close(settle(model)(data()[0][0]), before)
    layer = next(m for m in model.modules() if isinstance(m, Banked))
    layer.reset_parameters()
    assert not layer.weight[:, ~layer.partial.mask].any()


def test_a_factor_waits_for_its_first_static_position():
    model = network()
    for m in model.modules():
        if isinstance(m, Banked):
            m.add_partial("s")
    model.train()(data()[0][0]).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    fresh = copy.deepcopy(model)
    make_partial(model, data(), loss, keep=0.3, scales="s")
    fresh.load_state_dict(model.state_dict())  # as a resumed training does
    assert all(m.partial.phi.requires_grad for net in (model, fresh) for m in net.modules() if isinstance(m, Banked))


def test_modes_are_put_back_whatever_the_loss_does():
    model = network().eval()
    make_partial(model, data(), lambda m, batch: loss(m.train(), batch), keep=0.3)
    assert not any(m.training for m in model.modules())


def test_synflow_of_networks_that_take_no_ones():
    with pytest.raises(ValueError, match=r"whose input is torch.int64; give flow="):
        make_partial(network(), [(torch.ones(2, 3, dtype=torch.int64), None)], loss, method="synflow")
    told = make_partial(network(), None, None, keep=0.3, method="synflow", rounds=1, flow=lambda m: m(torch.ones(1, *data()[0][0].shape[1:])).sum())
    assert sum(int(m.partial.mask.sum()) for m in told.modules() if isinstance(m, Banked)) > 0


@pytest.mark.parametrize(("scales", "keep"), [("s", 1.0), ("d", 0.0)])
def test_a_factor_of_no_position_is_not_trained(scales, keep):
    model = make_partial(network(), None, None, keep=keep, method="random", scales=scales)
    model.train()(data()[0][0]).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(m.partial.phi.requires_grad for m in model.modules() if isinstance(m, Banked))


def test_a_frozen_layer_stays_frozen():
    model = network()
    model[3].requires_grad_(False)
    make_partial(model, data(), loss, keep=0.3)
    assert not any(p.requires_grad for p in model[3].parameters()) and model[6].partial.phi.requires_grad


@pytest.mark.parametrize("method", CRITERIA)
def test_what_is_left_untouched(method):
    model = network()
    model[1].eval()
    loss(model, data()[0]).backward()
    modes = {n: m.training for n, m in model.named_modules()}
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    attention = {n: p.clone() for n, p in model.named_parameters() if "attention" in n}
    random = torch.random.get_rng_state()
    make_partial(model, data(), loss, keep=0.3, method=method)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in buffers.items())
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in attention.items())
    for name, p in model.named_parameters():
        scored = name.split(".")[0] in ("3", "6", "8") and (name.endswith((".weight", "static", "phi")) and "attention" not in name)
        assert (p.grad is None) if scored else torch.equal(p.grad, kept[name]), name
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_banks_stay_frozen():
    model = network()
    for m in model.modules():
        if isinstance(m, Banked):
            m.weight.requires_grad_(False)
    make_partial(model, data(), loss, keep=0.3)
    assert not any(t.requires_grad for m in model.modules() if isinstance(m, Banked) for t in (m.weight, m.partial.static))


def test_seeds_static_starts_and_the_shuffled_control():
    def masks_of(**kwargs):
        return list(masks(make_partial(network(), data(), loss, keep=0.3, **kwargs)).values())

    one, again, other = masks_of(method="random", seed=1), masks_of(method="random", seed=1), masks_of(method="random", seed=2)
    assert all(map(torch.equal, one, again)) and not all(map(torch.equal, one, other))
    assert all(map(torch.equal, masks_of(method="random", rounds=1, seed=1), masks_of(method="random", rounds=5, seed=1)))
    plain, shuffled = masks_of(), masks_of(shuffle="within_tensor")
    assert [int(m.sum()) for m in plain] == [int(m.sum()) for m in shuffled] and not all(map(torch.equal, plain, shuffled))
    mean, fresh = (make_partial(network(), data(), loss, keep=0.3, static=s)[3] for s in ("mean", "fresh"))
    start = network()[3].weight.detach().mean(0)
    assert torch.equal(mean.partial.static, start.masked_fill(mean.partial.mask, 0)) and not torch.equal(fresh.partial.static, mean.partial.static)
    with pytest.raises(ValueError, match="static='median' is unknown; allowed: mean, fresh"):
        make_partial(network(), data(), loss, static="median")


@pytest.mark.parametrize("scales", ["both", "s", "d", "none", "prune"])
def test_scale_ablations(scales):
    model = make_partial(network(), data(), loss, keep=0.3, scales=scales)
    counts = count_parameters(model)
    phi = 0 if scales in ("none", "prune") else 3
    dead = 4 * (TOTAL - dynamic(model)) + phi + (0 if scales == "prune" else dynamic(model))
    assert counts["stored"] == counts["total"] - dead
    assert ("3.partial.static" in model.state_dict()) == (scales != "prune")
    with pytest.raises(ValueError, match=f"has modes with scales='{scales}' already"):
        make_partial(model, data(), loss, keep=0.2, scales="prune" if scales != "prune" else "both")


@pytest.mark.parametrize(("change", "message"), [
    (dict(keep=1.5), r"keep=1.5 must be a share in \[0, 1\] or an int count"), (dict(keep=-0.1), r"keep=-0.1 must be a share"),
    (dict(keep=10_000), "must lie in 0..656"), (dict(rounds=0), "rounds=0 must be an integer, at least 1"),
    (dict(rounds=2.5), "rounds=2.5 must be an integer"), (dict(keep=True), "keep=True must be a share"), (dict(rounds=True), "rounds=True must be an integer"),
    (dict(batches=torch.zeros(2, 3, 9, 9)), r"batches is a Tensor; give a list of batches, \[batch\] for a single one"),
    (dict(rounds=0, keep=0.0), "rounds=0 must be"),
    (dict(schedule="x", keep=1.0), "schedule='x' is unknown"),
    (dict(scope="x", keep=0.0), "scope='x' is unknown"),
    (dict(schedule="cosine"), "schedule='cosine' is unknown; allowed: exponential, linear"),
    (dict(loss_fn=None), r"method='snip' looks at a loss; give loss_fn\(model, batch\) -> scalar"),
    (dict(method="fisher"), "method='fisher' is unknown; allowed: snip, removal"),
    (dict(scales="x"), "scales='x' is unknown; allowed: both, s, d, none, prune"), (dict(batches=[]), "a gradient looks at data, and there are no batches"),
    (dict(temperature=0), "temperature=0 must be positive"), (dict(scope="layer"), "scope='layer' is unknown"),
])
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        make_partial(**(dict(model=network(), batches=data(), loss_fn=loss) | change))


@pytest.mark.parametrize("keep", [0, 1])
def test_the_ends_of_the_scale_may_be_ints(keep):
    model = make_partial(network(), data(), loss, keep=keep)
    assert set(dynamic_shares(model).values()) == {keep}


@pytest.mark.parametrize("kind", ["dyconv", "condconv", "odconv"])
@pytest.mark.parametrize("num_kernels", [1, 3])
def test_a_compact_layer_trains_what_its_output_asks_for(kind, num_kernels):
    """Processes that train together wait for the gradients of all that trains."""
    layer = KINDS[kind](4, 6, 3, bias=True, num_kernels=num_kernels, reduction=1).train()
    x = torch.randn(5, 4, 7, 7)
    small = compact(nn.Sequential(copy.deepcopy(make_partial(nn.Sequential(layer), None, None, keep=0.0)[0])))
    small(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
    some = compact(make_partial(nn.Sequential(KINDS[kind](4, 6, 3, bias=True, num_kernels=num_kernels, reduction=1)), None, None, keep=0.5, method="random"))
    small.load_state_dict(some.state_dict())  # with dynamic positions all of it trains again
    small.zero_grad(set_to_none=True)
    small(x).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in small[0].attention.parameters())


def test_static_values_fit_the_mask():
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[0] = False
    with pytest.raises(ValueError, match=r"static values must be \[6, 4, 3, 3\], as the mask; got \[4, 6, 3, 3\]"):
        PartialConv2d(4, 6, 3, mask=mask, static=torch.zeros(4, 6, 3, 3))


def test_scores_need_autograd():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"scores need autograd, which torch.inference_mode\(\) turns off"):
        make_partial(network(), data(), loss)


def test_models_without_dynamic_layers():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="make_partial: Sequential has no dynamic layer; call make_dynamic"):
        make_partial(plain, data(), loss)
    with pytest.raises(ValueError, match="compact: no layer of Sequential has modes; call make_partial first"):
        compact(network())


def test_a_file_says_what_the_attention_of_a_compact_network_trains():
    def asked(net):
        return [any(p.requires_grad for p in m.attention.parameters()) for m in net.modules() if isinstance(m, Banked)]

    def made(keep):
        return compact(make_partial(network(), [], None, keep=keep, method="random"))

    some, none = made(0.5), made(0)
    assert asked(some) == [True] * 3 and asked(none) == [False, False, True]  # the last has a bias of each kernel
    some.load_state_dict(made(0).state_dict())
    none.load_state_dict(made(0.5).state_dict())
    assert asked(some) == [False, False, True] and asked(none) == [True] * 3
    frozen = compact(make_partial(network().requires_grad_(False), [], None, keep=0, method="random"))
    frozen.load_state_dict(made(0.5).state_dict())
    assert not any(asked(copy.deepcopy(frozen)))
