"""Linear experts: their limits, dead entries, compact form, files (PAD-Net sections 3, 8: facts 5-9, 11, 23)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dyn.nn.bank import CompactBank
from dyn.nn.count import count_parameters
from dyn.nn.linear_experts import LinearExperts
from dyn.nn.partial import PartialExperts, compact

SCALES = ("both", "s", "d", "none", "prune")
E, K, I, O = 4, 2, 6, 5


def layer(keep=0.4, scales="both", phi=0.5, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    made = PartialExperts(I, O, E, K, scales=scales, **kwargs).to(dtype)
    nn.init.normal_(made.weight)
    if made.bias is not None:
        nn.init.normal_(made.bias)
    if made.partial.phi is not None:
        nn.init.constant_(made.partial.phi, phi)
    if keep is not None:
        made.partition(torch.rand(O, I) < keep, torch.randn(O, I, dtype=dtype))
    return made.eval()


def x(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (3, 7)), I, generator=torch.Generator().manual_seed(2), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*(st.integers(1, n) for n in (40, 9, 9, 6))), st.data())
def test_copies_are_the_dense_linear(sizes, data):
    """Whatever the sizes and the number of experts a token."""
    T, I_, O_, E_ = sizes
    torch.manual_seed(0)
    linear = nn.Linear(I_, O_, bias=data.draw(st.booleans())).double()
    made = LinearExperts.from_linear(linear, E_, data.draw(st.integers(1, E_)))
    tokens = torch.randn(T, I_, dtype=torch.float64)
    torch.testing.assert_close(made(tokens), linear(tokens), rtol=1e-10, atol=1e-10)


def test_all_dynamic_is_the_mixture():
    """kappa = 1; lambda_d multiplies weights, not biases."""
    for mask in (None, torch.ones(O, I, dtype=torch.bool)):
        torch.manual_seed(0)
        partial = PartialExperts(I, O, E, K, mask=mask).double().eval()
        nn.init.normal_(partial.bias)
        plain = LinearExperts(I, O, E, K).double().eval()
        plain.load_state_dict({k: v for k, v in partial.state_dict().items() if not k.startswith("partial.")})
        torch.testing.assert_close(partial(x()), plain(x()), rtol=0, atol=0)
        nn.init.constant_(partial.partial.phi, 1.0)
        plain.weight.data.mul_(2 * torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
        torch.testing.assert_close(partial(x()), plain(x()))


def test_nothing_dynamic_is_one_linear():
    """kappa = 0: no gradient for gate and experts' weights."""
    net, static = layer(None, bias=False), torch.randn(O, I, dtype=torch.float64)
    net.partition(torch.zeros(O, I, dtype=torch.bool), static)
    assert net.form == "static"
    want = F.linear(x(), 2 * torch.sigmoid(torch.tensor(-0.5, dtype=torch.float64)) * static)
    for form in ("merged", "factorised", "static"):
        net.form = form
        y = net(x())
        torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
        y.square().sum().backward()
        gradients = [net.weight.grad, *(p.grad for p in net.gate.parameters())]
        assert all(g is None or g.abs().max() < 1e-10 for g in gradients)
    torch.testing.assert_close(compact(net)(x()), want, rtol=1e-10, atol=1e-10)


def test_equal_sets_make_mask_and_gate_irrelevant():
    net = layer(None, scales="none", bias=False)
    shared = torch.randn(O, I, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(shared.expand_as(net.weight))
    net.partial.hold(torch.rand(O, I) < 0.5, shared.clone())
    torch.testing.assert_close(net(x()), F.linear(x(), shared), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", ["unstructured", "inputs", "outputs", "everything", "nothing"])
def test_forms_agree_and_the_cheaper_one_is_taken(mask):
    torch.manual_seed(1)
    held = {"unstructured": torch.rand(O, I) < 0.5, "inputs": (torch.arange(I) < 2).expand(O, I), "outputs": (torch.arange(O) < 2)[:, None].expand(O, I),
            "everything": torch.ones(O, I, dtype=torch.bool), "nothing": torch.zeros(O, I, dtype=torch.bool)}[mask]
    net = layer(None)
    net.partition(held.clone(), torch.randn(O, I, dtype=torch.float64))
    assert net.form == {"unstructured": "merged", "everything": "merged", "nothing": "static"}.get(mask, "factorised")
    found = []
    for net.form in ("merged", "factorised"):
        found.append(net(x()))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shares", [(0.0, 0.4), (0.4, 0.0), (1.0, 0.4)])
def test_the_form_follows_modes_that_are_loaded(shares):
    """A layer that was all static computes with a file's dynamic positions, and trains them; the other way round its bank is still."""
    ours, theirs = (layer(None) for _ in range(2))
    for net, share in zip((ours, theirs), shares, strict=True):
        net.partition(torch.rand(O, I) < share, torch.randn(O, I, dtype=torch.float64))
    ours.load_state_dict(theirs.state_dict())
    assert ours.form == theirs.form and ours.weight.requires_grad == theirs.weight.requires_grad == bool(shares[1])
    torch.testing.assert_close(ours(x()), theirs(x()), rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
], ids=["sgd", "adamw"])
@pytest.mark.parametrize("form", ["merged", "factorised"])
def test_dead_entries_never_move(optimizer, form):
    net = layer(dtype=torch.float32).train()
    net.form = form
    mask, before = net.partial.mask.clone(), copy.deepcopy(net.state_dict())
    steps = optimizer(net.parameters())
    for _ in range(4):
        steps.zero_grad()
        net(x(dtype=torch.float32)).square().mean().backward()
        assert not net.weight.grad[:, ~mask].any() and not net.partial.static.grad[mask].any()
        assert net.weight.grad[:, mask].any() and net.partial.static.grad[~mask].any() and net.partial.phi.grad.any()
        steps.step()
    assert not net.weight[:, ~mask].any() and not net.partial.static[mask].any() and torch.equal(net.partial.mask, mask)
    assert not torch.equal(net.weight[:, mask], before["weight"][:, mask]) and not torch.equal(net.partial.static, before["partial.static"])


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.4, None])
@pytest.mark.parametrize("bias", [False, True])
def test_compact_is_the_masked_layer(scales, expand, keep, bias):
    """Scale factors are folded; N = E * D + (P - D), E biases and the gate."""
    net = layer(keep, scales, bias=bias)
    small = compact(net, expand=expand)
    torch.testing.assert_close(small(x()), net(x()), rtol=1e-11, atol=1e-12)
    D = O * I if keep is None else int(net.partial.mask.sum())
    apart = 2 * E * I + (E * O if bias else 0)
    assert small.partial.num_stored == E * D + (0 if scales == "prune" else O * I - D)
    assert count_parameters(small)["stored"] == count_parameters(net)["stored"] == small.partial.num_stored + apart
    assert isinstance(small.partial, CompactBank) and small.weight is None and net.partial is not small.partial
    other = compact(layer(None, scales, bias=bias), expand=not expand)  # sizes follow the file
    other.load_state_dict(small.state_dict())
    torch.testing.assert_close(other(x()), net(x()), rtol=1e-11, atol=1e-12)


def test_counts():
    counts = count_parameters(layer(0.4))
    D = int(layer(0.4).partial.mask.sum())
    assert counts == {"total": E * O * I + O * I + E * O + 2 * E * I + 1, "active": O * I + K * O + (K - 1) * D, "gate": 2 * E * I, "dynamic": E * (D + O),
                      "static": O * I - D, "stored": E * D + O * I - D + E * O + 2 * E * I, "trainable": E * O * I + O * I + E * O + 2 * E * I + 1}


def test_files(tmp_path):
    net = layer(dtype=torch.float32)
    for expand in (False, True):
        save_file(compact(net, expand).state_dict(), tmp_path / f"{expand}.safetensors")
        again = compact(layer(None, dtype=torch.float32), expand)
        again.load_state_dict(load_file(tmp_path / f"{expand}.safetensors"))
        torch.testing.assert_close(again(x(dtype=torch.float32)), net(x(dtype=torch.float32)))
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
    save_file(net.state_dict(), tmp_path / "masked.safetensors")
    again = layer(None, dtype=torch.float32)
    again.load_state_dict(load_file(tmp_path / "masked.safetensors"))
    torch.testing.assert_close(again(x(dtype=torch.float32)), net(x(dtype=torch.float32)), rtol=0, atol=0)


@pytest.mark.parametrize("scales", SCALES)
def test_layers_export_and_compile_whole(scales):
    net = layer(scales=scales, dtype=torch.float32)
    tokens = x(dtype=torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(tokens), net(tokens))
    for expand in (False, True):
        exported = torch.export.export(compact(net, expand), (tokens,))
        torch.testing.assert_close(exported.module()(tokens), net(tokens))


def test_low_precision():
    """Autocast and bfloat16 layers give the dtype of a linear, near the float32 result."""
    net = layer(dtype=torch.float32)
    tokens = x(40, dtype=torch.float32)
    for made in (net, compact(net), layer(0.0, dtype=torch.float32), compact(layer(0.0, dtype=torch.float32))):
        want = made(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            y = made(tokens)
        assert y.dtype == torch.bfloat16 and (y - want).abs().max() < 0.05 * want.abs().max()
        short = copy.deepcopy(made).bfloat16()(tokens.bfloat16())
        assert short.dtype == torch.bfloat16 and (short - want).abs().mean() < 0.1 * want.abs().mean()


def test_errors():
    with pytest.raises(ValueError, match="gate='switch' gives scores that do not sum to one"):
        LinearExperts(I, O, E, 1, gate="switch")
    with pytest.raises(ValueError, match="num_experts_per_tok=5 must be between 1 and num_experts=4"):
        LinearExperts(I, O, 4, 5)
    with pytest.raises(ValueError, match=r"mask must be bool \[5, 6\], one set of the bank"):
        LinearExperts(I, O, E, K).partition(torch.ones(I, O, dtype=torch.bool))
    with pytest.raises(ValueError, match="has a compact form already"):
        compact(layer()).add_partial()
