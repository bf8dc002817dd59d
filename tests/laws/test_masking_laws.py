"""Pruning and masked training: budgets are exact, the flat form trains as the masked one, narrowed bottlenecks compute what masked ones did."""

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dyn.core.partition import kept_count
from dyn.core.saliency import gradient
from dyn.nn.adapter_modules import Bottleneck, LoRA
from dyn.nn.masking import PRUNING, dense_weights, large_sparse, masks, prune, set_masks
from dyn.nn.structured import two_of_four


class Tower(nn.Module):
    """Residual bottlenecks and a LoRA on frozen layers, with a head."""

    def __init__(self, d=12, r=8, depth=2, init="bert", dtype=torch.float32, activation="relu") -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(d, d, dtype=dtype).requires_grad_(False) for _ in range(depth))
        self.blocks = nn.ModuleList(Bottleneck(d, r, activation=activation, dtype=dtype) for _ in range(depth))
        self.lora, self.head = LoRA(d, d, 4, scaling=2.0, dtype=dtype), nn.Linear(d, 3, dtype=dtype)
        for linear in (*self.layers, self.head):
            linear.weight.data.copy_(torch.randn(linear.weight.shape, generator=g) / d**0.5)
            linear.bias.data.zero_()
        for block in (*self.blocks, self.lora):
            block.draw(init, g)
            for p in block.parameters():
                p.data.mul_(10)

    def forward(self, x):
        for layer, block in zip(self.layers, self.blocks, strict=True):
            h = layer(x).tanh()
            x = h + block(h)
        return self.head(x + self.lora(x))


def data(d=12, n=24, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, d, generator=g).to(dtype), torch.randint(3, (n,), generator=g)) for _ in range(2)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@settings(max_examples=40, deadline=None)
@given(keep=st.fractions(Fraction(1, 20), 1), method=st.sampled_from(PRUNING), scope=st.sampled_from(["global", "local", "erdos_renyi"]),
       form=st.sampled_from(["mask", "flat", "unit"]), rounds=st.integers(1, 3), seed=st.integers(0, 9), init=st.sampled_from(["bert", "lora", "zero_up"]))
def test_budgets_are_exact_whatever_the_method(keep, method, scope, form, rounds, seed, init):
    model = Tower(init=init)
    if method == "erdos_renyi":
        scope = "global"
    prune(model, data(), loss, method, keep, scope, form, rounds=rounds, seed=seed)
    if form == "unit":
        got = [m.down.out_features for m in model.blocks] + [model.lora.A.out_features]
        sizes = [8, 8, 4]
    else:
        got, sizes = zip(*[(int(m.sum()), m.numel()) for m in masks(model).values()], strict=True)
    if scope == "local":
        assert list(got) == [kept_count(n, keep) for n in sizes]
    else:
        assert sum(got) == kept_count(sum(sizes), keep)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_ties_of_a_zero_projection_are_drawn_not_taken_from_the_front(scope):
    """Magnitude of an adapter whose entries are all alike."""
    block = Bottleneck(32, 16)
    nn.init.constant_(block.down.weight, 0.5)
    nn.init.constant_(block.up.weight, 0.5)
    first, second = (masks(prune(copy.deepcopy(block), None, None, "magnitude", keep=0.5, scope=scope, seed=s))["down.weight"] for s in (0, 1))
    assert not torch.equal(first, second) and 0.3 < first[:8].float().mean() < 0.7


OPTIMISERS = {"adamw": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.98), weight_decay=0.1),
              "adamw, fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
              "adam, foreach": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, foreach=True),
              "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
              "sgd, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, fused=True)}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
@pytest.mark.parametrize("clip", [0.0, 1e6, 0.02])
def test_flat_values_train_as_masked_weights(make, clip):
    """Bitwise, unless a norm clip acts: the norm of the same gradients without their zeros is summed in another order."""
    masked, flat = (prune(Tower(d=24, r=16), data(24), loss, keep=0.3, form=form) for form in ("mask", "flat"))
    optimizers = []
    for model in (masked, flat):
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        for _ in range(12):
            for batch in data(24):
                (loss(model, batch) / 48).backward()
            if clip:
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                assert (norm > clip) == (clip == 0.02)
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    close = dict(rtol=0, atol=0) if clip != 0.02 else dict(rtol=0, atol=1e-6)
    found = masks(masked)
    for key, weight in dense_weights(flat).items():
        torch.testing.assert_close(weight, masked.get_parameter(key), **close)
        for ours, theirs in zip(*(o.state[m.get_parameter(key)].values() for o, m in zip(optimizers, (flat, masked), strict=True)), strict=True):
            torch.testing.assert_close(ours[: found[key].sum()] if ours.ndim else ours, theirs[found[key]] if theirs.ndim else theirs, **close)
    assert (masked.blocks[0].down.weight != prune(Tower(d=24, r=16), data(24), loss, keep=0.3).blocks[0].down.weight).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.sampled_from([0.1, 0.3, 0.5, 0.9]), scope=st.sampled_from(["global", "local"]),
       method=st.sampled_from(["random", "magnitude", "snip"]), activation=st.sampled_from(["relu", "silu"]))
def test_a_narrowed_bottleneck_computes_what_the_masked_one_does(seed, keep, scope, method, activation):
    narrow = prune(Tower(dtype=torch.float64, activation=activation), data(dtype=torch.float64), loss, method, keep, scope, "unit", seed=seed)
    wide = Tower(dtype=torch.float64, activation=activation)
    for small, big in ((narrow.blocks[0], wide.blocks[0]), (narrow.blocks[1], wide.blocks[1]), (narrow.lora, wide.lora)):
        (inner, outer), (first, second) = ((b.down, b.up) if isinstance(b, Bottleneck) else (b.A, b.B) for b in (small, big))
        assert inner.weight.shape == (inner.out_features, 12) and outer.weight.shape == (12, outer.in_features) == (12, inner.out_features)
        assert inner.weight.is_contiguous() and outer.weight.is_contiguous()
        rows = {tuple(row.tolist()): i for i, row in enumerate(first.weight)}
        kept = torch.zeros(len(first.weight), dtype=torch.bool)
        kept[[rows[tuple(row.tolist())] for row in inner.weight]] = True
        set_masks(wide, {k: m for k, p in wide.named_parameters() for q, m in ((first.weight, kept[:, None]), (second.weight, kept)) if p is q
                         for m in [m.expand(p.shape)]})
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), wide(x), rtol=1e-12, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), ties=st.booleans(), shuffle=st.booleans(), rows=st.integers(1, 9), groups=st.integers(1, 6))
def test_two_of_every_four(seed, ties, shuffle, rows, groups):
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(2, (rows, 4 * groups), generator=g).float() if ties else torch.rand(rows, 4 * groups, generator=g)
    mask = two_of_four({"w": s}, seed, shuffle)["w"]
    assert mask.shape == s.shape and mask.view(-1, 4).sum(1).eq(2).all()
    if not shuffle:
        kept, out = s[mask].view(-1, 2), s[~mask].view(-1, 2)
        assert (kept.min(1).values >= out.max(1).values).all()


def test_two_of_four_lies_along_the_input():
    model = prune(Tower(), data(), loss, form="2:4")
    assert all(m.view(-1, 4).sum(1).eq(2).all() and m.sum() * 2 == m.numel() for m in masks(model).values())
    assert not all(m.T.reshape(-1, 4).sum(1).eq(2).all() for m in masks(model).values())
    twins = [masks(prune(Tower(), data(), loss, form="2:4", shuffle=s))["blocks.0.up.weight"] for s in (None, "within_tensor")]
    assert not torch.equal(*twins) and all(m.view(-1, 4).sum(1).eq(2).all() for m in twins)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_snip_is_conserved_in_every_unit(dtype, tolerance):
    """Golden fact 15: what flows into a unit of a ReLU bottleneck flows out of it (zero bias, no dropout)."""
    model = Tower(dtype=dtype)
    names = [f"blocks.{i}.{w}.weight" for i in (0, 1) for w in ("down", "up")]
    signed = {k: g * model.get_parameter(k) for k, g in gradient(model, data(dtype=dtype), loss, names).items()}
    for i in (0, 1):
        inward, outward = signed[f"blocks.{i}.down.weight"].sum(1), signed[f"blocks.{i}.up.weight"].sum(0)
        assert ((inward - outward).abs() <= tolerance * signed[f"blocks.{i}.up.weight"].abs().sum(0)).all() and inward.abs().min() > 0


@given(r=st.integers(1, 300), factor=st.integers(1, 12), width=st.integers(1, 1024))
@settings(max_examples=100, deadline=None)
def test_large_sparse_trains_as_many_weights(r, factor, width):
    preset = large_sparse(r, factor)
    assert preset.r == factor * r and kept_count(2 * width * preset.r, preset.keep) == 2 * width * r
    assert large_sparse(6 * r, Fraction(7, 6)).r == 7 * r and math.isclose(float(preset.keep), 1 / factor)
