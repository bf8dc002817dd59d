"""SparseAdapter: the golden facts of the specification's section 8 about scores, masks and masked training.

Facts 15 and 33 (conservation, chunks) are in laws/test_masking_laws.py and unit/test_score.py; 20, 29 to 31 and 35 in unit/test_masked.py and
unit/test_prune.py.
"""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyn.core.partition import erdos_renyi_counts, keep_masks, kept_count
from dyn.core.saliency import score
from dyn.nn.adapter_modules import Bottleneck, LoRA, Prefix
from dyn.nn.count import count_parameters
from dyn.nn.masking import dense_weights, large_sparse, masks, prune, set_masks
from dyn.nn.structured import dead_units


def houlsby(r=64, blocks=24, d=768, seed=0):
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = nn.ModuleList(Bottleneck(d, r) for _ in range(blocks))
    model = model.to_empty(device="cpu")
    for block in model:
        block.draw("bert")
    return model


@pytest.fixture(scope="module")
def full():
    return houlsby()


def kept(model):
    return sum(int(m.sum()) for m in masks(model).values())


@pytest.mark.parametrize(("keep", "count"), [(0.8, 1_887_437), (0.6, 1_415_578), (0.4, 943_718), (0.2, 471_859), (0.1, 235_930)])
def test_fact_9_and_11_exact_counts(full, keep, count):
    model = prune(full, None, None, "random", keep=keep)  # from the largest budget to the smallest: each goes on from the one before
    assert kept(model) == count and count_parameters(model)["trainable"] == count + 19_968
    assert {0.6: 1.1517, 0.2: 0.3946}.get(keep) in (None, round(100 * (count + 19_968) / 124_645_632, 4))
    assert all(not w[~m].any() for (k, w), m in zip(dense_weights(model).items(), masks(model).values(), strict=True))


def test_fact_9_pfeiffer_and_10_the_official_rule():
    assert kept_count(1_179_648, 0.6) == 707_789
    total = 2_359_296
    assert [total - math.ceil(Fraction(cut, 10) * total) for cut in (4, 6)] == [1_415_577, 943_718] and kept_count(total, 0.6) == 1_415_578


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8, 10])
def test_fact_12_and_13_large_sparse(factor):
    r, keep = large_sparse(64, factor)
    assert (r, keep) == (64 * factor, Fraction(1, factor)) and kept_count(24 * 2 * 768 * r, keep) == 2_359_296
    if trained := {2: 2_380_800, 3: 2_382_336, 4: 2_383_872}.get(factor):
        assert count_parameters(prune(houlsby(r), None, None, "random", keep=keep))["trainable"] == trained
    assert kept_count(24 * 2 * 768 * 192, 0.33) == 2_335_703


def toy(init="bert", d=32, r=12):
    """Two blocks with 1,536 weights, as in the runs of facts 17 and 22."""
    torch.manual_seed(0)

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(d, d).requires_grad_(False) for _ in range(2))
            self.blocks, self.head = nn.ModuleList(Bottleneck(d, r) for _ in range(2)), nn.Linear(d, 3)

        def forward(self, x):
            for layer, block in zip(self.layers, self.blocks, strict=True):
                h = layer(x).tanh()
                x = h + block(h)
            return self.head(x)

    model = Toy()
    for block in model.blocks:
        block.draw(init)
    return model


def data(d=32):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, d, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(3)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_fact_14_snip_is_the_gradient_of_masks_of_ones():
    model = toy()
    names = [f"blocks.{i}.{w}.weight" for i in (0, 1) for w in ("down", "up")]
    ones = {n: torch.ones_like(model.get_parameter(n), requires_grad=True) for n in names}
    total = sum(F.cross_entropy(torch.func.functional_call(model, {n: model.get_parameter(n).detach() * m for n, m in ones.items()}, b[0]), b[1])
                for b in data())
    found = score(model, data(), loss, "snip", names)
    for n, g in zip(names, torch.autograd.grad(total, list(ones.values())), strict=True):
        assert (found[n] - g.abs()).abs().max() <= 1e-7


@pytest.mark.parametrize("method", ["snip", "magnitude", "grasp", "synflow", "random"])
def test_fact_16_and_17_a_zero_up_projection(method):
    """The official code keeps 100 % (snip), half with all of W_up gone (magnitude), 28 % (grasp) or nothing (synflow)."""
    model = toy("lora")
    for block in model.blocks:
        assert not block.up.weight.any()
    names = [f"blocks.{i}.{w}.weight" for i in (0, 1) for w in ("down", "up")]
    if method == "snip":
        sum(loss(model, batch) for batch in data()).backward()
        assert all(not block.down.weight.grad.any() and block.up.weight.grad.any() for block in model.blocks)
        assert not any(s.any() for s in score(model, data(), loss, "snip", names).values())
    prune(model, data(), loss, method, keep=0.6)
    assert kept(model) == 922 and all(m.any() for m in masks(model).values())
    assert not any(block.up.weight.any() for block in model.blocks)


def test_fact_18_zeroed_weights_stay_zero_and_19_unzeroed_ones_would_only_shrink():
    model = prune(toy(), data(), loss, keep=0.6)
    found = masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    unzeroed = nn.Parameter(torch.ones(3, dtype=torch.float64))
    official = torch.optim.AdamW([unzeroed], lr=1e-4, weight_decay=0.1)
    for step in range(200):
        loss(model, data()[step % 3]).backward()
        optimizer.step()
        optimizer.zero_grad()
        unzeroed.grad = torch.zeros_like(unzeroed)
        official.step()
    for key, mask in found.items():
        p = model.get_parameter(key)
        state = optimizer.state[p]
        assert not p[~mask].any() and not state["exp_avg"][~mask].any() and not state["exp_avg_sq"][~mask].any() and p.count_nonzero() == mask.sum()
    torch.testing.assert_close(unzeroed.detach(), torch.full_like(unzeroed, 0.998002), rtol=0, atol=1e-6)


def test_fact_21_erdos_renyi():
    shapes = {"q": torch.Size((10, 768)), "Q": torch.Size((768, 10)), "f": torch.Size((10, 768)), "F": torch.Size((3072, 10)), "g": torch.Size((10, 3072)),
              "G": torch.Size((768, 10))} | {"v": torch.Size((10, 768)), "V": torch.Size((768, 10))}
    density = {k: c / math.prod(shapes[k]) for k, c in erdos_renyi_counts(shapes, 0.6).items()}
    assert {round(density[k], 3) for k in "qQvVfG"} == {0.603} and {round(density[k], 4) for k in "Fg"} == {0.5975}
    equal = prune(houlsby(blocks=1), None, None, "erdos_renyi", keep=0.6)
    assert {int(m.sum()) for m in masks(equal).values()} <= {29491, 29492} and kept(equal) == kept_count(98_304, 0.6)
    assert math.isclose(0.6 * 64 * 768 / (64 + 768), 35.4462, abs_tol=5e-5)


def test_fact_22_random_masks():
    model = prune(toy(), None, None, "random", keep=0.6)
    assert kept(model) == 922 and len({int(m.sum()) for m in masks(model).values()}) > 1
    local = masks(prune(toy(), None, None, "random", keep=0.6, scope="local"))
    assert all(abs(int(m.sum()) - 0.6 * m.numel()) <= 1 for m in local.values())


def test_fact_23_a_square_bottleneck():
    model = houlsby(r=768, blocks=1)
    down, up = (torch.zeros(768, 768, dtype=torch.bool) for _ in range(2))
    down[:10], up[:, :5] = True, True
    set_masks(model, {"0.down.weight": down, "0.up.weight": up})
    assert model[0].down.weight.count_nonzero() == 7680 and model[0].up.weight.count_nonzero() == 3840 and not model[0].up.weight[:, 5:].any()
    scores = {key: p.detach().abs() for key, p in houlsby(r=768, blocks=1).named_parameters() if key.endswith("weight")}
    ours, wanted = masks(prune(houlsby(r=768, blocks=1), None, None, "magnitude")), keep_masks(scores)
    assert ours.keys() == wanted.keys() and all(torch.equal(mask, wanted[key]) for key, mask in ours.items())


@pytest.mark.parametrize(("r", "blocks", "size"), [(64, 24, 2_654_208), (128, 24, 5_308_416)])
def test_fact_27_two_of_four(r, blocks, size):
    model = prune(houlsby(r, blocks), None, None, "magnitude", form="2:4")
    assert all(m.view(-1, 4).sum(1).eq(2).all() for m in masks(model).values())
    total = 4 * 12 * 768 * r
    assert kept(model) == total // 2 and (r == 64 or kept(model) == 2_359_296)
    assert total // 2 * 2 + total // 2 * 2 // 8 == size == 0.5625 * 2 * total  # bf16 values, and 2 bits for each of where it was


def disturbance(model):
    x = torch.randn(256, 768, generator=torch.Generator().manual_seed(3))
    return (model[0](x).norm() / x.norm()).item()


@pytest.mark.parametrize(("r", "keep", "expected", "rescaled"), [(64, 1.0, 0.0627, 0.0627), (64, 0.6, 0.0376, 0.0627), (64, 0.2, 0.0125, 0.0627),
                                                                  (256, 1.0, 0.1254, 0.1254), (256, 0.25, 0.0314, 0.1254)])
def test_fact_28_what_an_adapter_disturbs_at_the_start(r, keep, expected, rescaled):
    """And section 7.12: survivors divided by the root of their share restore what the dense adapter would do."""
    for rescale, wanted in ((False, expected), (True, rescaled)):
        model = prune(houlsby(r, 1), None, None, "random", keep=keep, scope="local", rescale=rescale)
        assert disturbance(model) == pytest.approx(wanted, rel=0.05)


def test_fact_32_mam_with_and_without_its_prefix():
    torch.manual_seed(0)
    for prefix, count in ((True, 353_894), (False, 471_859)):
        model = nn.ModuleList([*(Bottleneck(768, 16) for _ in range(12)), *(Prefix(768, 16) for _ in range(12))])
        for block in model:
            block.draw("bert")
        prune(model, None, None, "random", keep=0.6, prefix=prefix)
        assert sum(int(m.sum()) for m in masks(model).values()) + (0 if prefix else 294_912) == count


def test_fact_34_memory_of_the_flat_form():
    """r = 256 at keep 1/4: parameters, gradients, two moments and bits of the weights, 38.9 MB against 151.0 MB dense."""
    def megabytes(model):
        weights = [p for k, p in model.named_parameters() if k.endswith("weight")]
        for p in weights:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(weights)
        optimizer.step()
        moments = [m for p in weights for k, m in optimizer.state[p].items() if k != "step"]
        bits = [b for k, b in model.named_buffers() if k.endswith("bits")]
        return sum(t.numel() * t.element_size() for t in (*weights, *(p.grad for p in weights), *moments, *bits)) / 1e6

    preset = large_sparse(64, 4)
    model = prune(houlsby(preset.r), None, None, "random", keep=preset.keep, form="flat")
    assert megabytes(model) == pytest.approx(38.9, abs=0.06)
    assert megabytes(houlsby(64)) == pytest.approx(37.7, abs=0.06)
    assert round(16 * 24 * 2 * 768 * preset.r / 1e6, 1) == 151.0  # dense


@pytest.mark.parametrize(("keep", "share"), [(0.2, 0.0), (0.05, 0.0), (0.01, 0.00065)])
def test_unstructured_masks_leave_hardly_a_unit_dead(keep, share):
    """Section 7.7: no free compression."""
    dead = dead_units(prune(houlsby(seed=1), None, None, "random", keep=keep))
    assert len(dead) == 24 and sum(dead.values()) / (24 * 64) == pytest.approx(share, abs=0.0015 if share else 0)


def test_lora_counts():
    for r, total, count in ((8, 294_912, 176_947), (10, 368_640, 221_184), (16, 589_824, 353_894)):
        model = nn.ModuleList(LoRA(768, 768, r, scaling=1.0) for _ in range(24))
        assert sum(p.numel() for p in model.parameters()) == total
        assert kept(prune(model, None, None, "random", keep=0.6)) == count
