"""Linear experts against a loop over tokens that follows the paper's equations, in float64, values and gradients (PAD-Net sections 2.2, 3.2)."""

import math

import pytest
import torch
from torch import nn

from dyn.nn.linear_experts import LinearExperts
from dyn.nn.partial import PartialExperts, compact

E, K, I, O, T = 5, 2, 7, 6, 11


def layer(mode, scales="both", **kwargs):
    torch.manual_seed(0)
    mask = {"unstructured": torch.rand(O, I) < 0.4, "inputs": (torch.rand(I) < 0.5).expand(O, I), "none": torch.zeros(O, I, dtype=torch.bool),
            "all": torch.ones(O, I, dtype=torch.bool)}.get(mode)
    made = LinearExperts(I, O, E, K, **kwargs) if mode == "plain" else PartialExperts(I, O, E, K, mask=mask, static=torch.randn(O, I), scales=scales, **kwargs)
    for parameter in made.parameters():
        if parameter is not made.weight and (made.partial is None or parameter is not made.partial.static):
            nn.init.normal_(parameter, std=0.7)
    nn.init.normal_(made.weight)
    if mask is not None:
        made.weight.data.masked_fill_(~mask, 0)
    return made.double()


def tokens():
    return torch.randn(T, I, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_token(made, x_TI, noise_TE=None):
    """y = sum over the k largest logits of G_e (W'_e x + b_e), W'_e = lambda_d M W_e + lambda_s (1 - M) static, one token after the other."""
    partial, rows = made.partial, []
    for t, x in enumerate(x_TI):
        logits = made.gate.weight @ x
        if noise_TE is not None:
            logits = logits + noise_TE[t] * (nn.functional.softplus(made.gate.noise.weight @ x) + 0.01)
        chosen = sorted(range(E), key=lambda e: -logits[e].item())[:K]
        total = sum(logits[e].exp() for e in chosen)
        y = torch.zeros(O, dtype=x.dtype)
        for e in chosen:
            weight = made.weight[e]
            if partial is not None:
                phi = 0 if partial.phi is None else partial.phi
                dynamic = 2 / (1 + (-phi).exp()) if partial.scales in ("both", "d") else 1
                static = 2 / (1 + phi.exp()) if partial.scales in ("both", "s") else 1
                mask = torch.ones_like(weight) if partial.mask is None else partial.mask.double()
                weight = dynamic * mask * weight
                if partial.static is not None:
                    weight = weight + static * (1 - mask) * partial.static
            y = y + logits[e].exp() / total * (weight @ x + made.bias[e])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("mode", "scales"), [("plain", None), ("all", "both"), ("none", "both"), ("inputs", "both"),
                                              *(("unstructured", s) for s in ("both", "s", "d", "none", "prune"))])
@pytest.mark.parametrize("form", ["merged", "factorised"])
def test_values_and_gradients(mode, scales, form):
    made, x = layer(mode, scales).eval().requires_grad_(True), tokens().requires_grad_(True)  # what is static has weights that train no more
    made.form = form
    y, expected = made(x), by_token(made, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(T, O, dtype=torch.float64)
    inputs = [x, *(p for n, p in made.named_parameters() if "noise" not in n)]
    for mine, theirs in zip(torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    if made.partial is not None:
        for expand in (False, True):
            torch.testing.assert_close(compact(made, expand)(x), expected, rtol=1e-10, atol=1e-10)


def test_noise_while_training():
    made, x = layer("unstructured").train(), tokens()
    torch.manual_seed(5)
    noise = torch.randn(T, E, dtype=torch.float64)
    torch.manual_seed(5)
    torch.testing.assert_close(made(x), by_token(made, x, noise), rtol=1e-10, atol=1e-10)


def test_the_balance_loss_by_hand():
    """0.01 aside: CV^2(importance) + CV^2(load), the load a sum of normal probabilities; padding left out."""
    made, x = layer("plain").train(), tokens()
    real = torch.arange(T) < 8
    torch.manual_seed(5)
    noise = torch.randn(T, E, dtype=torch.float64)
    torch.manual_seed(5)
    choice = made.gate.choose(x)
    importance, load = [torch.zeros(E, dtype=torch.float64) for _ in range(2)]
    for t in range(8):
        clean = made.gate.weight @ x[t]
        std = nn.functional.softplus(made.gate.noise.weight @ x[t]) + 0.01
        noisy = clean + noise[t] * std
        order = noisy.sort(descending=True)
        importance[order.indices[:K]] += order.values[:K].softmax(0)
        for e in range(E):
            threshold = order.values[K] if noisy[e] > order.values[K] else order.values[K - 1]
            load[e] += 0.5 * (1 + torch.erf((clean[e] - threshold) / std[e] / math.sqrt(2)))
    expected = sum(u.var() / (u.mean() ** 2 + 1e-10) for u in (importance, load))
    routed = made.gate.statistics(choice, real)
    torch.testing.assert_close(routed.balance_loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, list(made.gate.parameters()), retain_graph=True) for loss in (routed.balance_loss, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
