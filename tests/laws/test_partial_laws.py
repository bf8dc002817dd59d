"""Partial layers: their limits, dead entries, scale factors, the compact form (PAD-Net sections 3, 8: facts 5-9, 11)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from dyn.core.mixture import held
from dyn.nn.bank import Banked, CompactBank
from dyn.nn.count import count_parameters
from dyn.nn.dynamic_conv import KINDS, DynamicConv2d
from dyn.nn.partial import PartialConv2d, compact, make_partial
from dyn.ops.dynamic_conv import dynamic_conv2d

SCALES = ("both", "s", "d", "none", "prune")


def layer(kind="dyconv", keep=0.4, scales="both", phi=0.5, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    made = KINDS[kind](4, 6, 3, padding=1, temperature=2.0, **kwargs) if kind != "condconv" else KINDS[kind](4, 6, 3, padding=1, **kwargs)
    made = made.to(dtype)
    made.add_partial(scales)
    if made.partial.phi is not None:
        nn.init.constant_(made.partial.phi, phi)
    if keep is not None:
        mask = torch.rand(6, 4, 3, 3) < keep
        made.partition(mask, torch.randn(6, 4, 3, 3, dtype=dtype))
    return made.eval()


def x(B=3, dtype=torch.float64):
    return torch.randn(B, 4, 5, 5, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("scales", SCALES)
def test_the_equation(scales):
    """lambda_d M * sum_k alpha_k W_k + lambda_s (1 - M) * static, sample by sample."""
    net = layer(scales=scales, bias=True)
    nn.init.normal_(net.bias)
    dynamic, static = (v.item() if isinstance(v, torch.Tensor) else v for v in net.partial.scale())
    assert (dynamic != 1) == (scales in ("both", "d")) and (static != 1) == (scales in ("both", "s"))
    mask, alpha = net.partial.mask, net.alpha(x())
    for b in range(3):
        kernel = dynamic * mask * torch.einsum("k,k...->...", alpha[b], net.weight)
        if scales != "prune":
            kernel = kernel + static * ~mask * net.partial.static
        torch.testing.assert_close(net(x())[b : b + 1], F.conv2d(x()[b : b + 1], kernel, alpha[b] @ net.bias, padding=1))


def test_a_gradient_that_others_read_is_left_alone():
    a, b, mask = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True), torch.tensor([True, False, True])
    (held(a, mask) + held(b, ~mask)).sum().backward()
    assert torch.equal(a.grad, mask.float().expand(2, 3)) and torch.equal(b.grad, (~mask).float().expand(2, 3))


@pytest.mark.parametrize("kind", ["dyconv", "condconv"])
def test_equal_kernels_that_turn_static_change_nothing(kind):
    net = layer(kind, keep=None, phi=1.0)
    nn.init.constant_(net.weight, 0.3)
    if kind == "condconv":
        nn.init.zeros_(net.attention.weight)
    before = net(x())
    net.partition(torch.rand(6, 4, 3, 3) < 0.4)
    torch.testing.assert_close(net(x()), before)


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_functional_gradients(form):
    net = layer() if form == "masked" else compact(layer())
    inputs, named = x(), {key: p.detach() for key, p in net.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(net, p, (inputs,)).square().sum())(named)
    net(inputs).square().sum().backward()
    torch.testing.assert_close(found, {key: p.grad for key, p in net.named_parameters()})


def test_a_mask_that_is_refused_leaves_no_trace():
    net = DynamicConv2d(4, 6, 3)
    with pytest.raises(ValueError, match="mask must be bool"):
        net.partition(torch.ones(3, 3, dtype=torch.bool))
    assert net.partial is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_attention_of_a_static_layer_is_not_trained(kind, bias):
    net = compact(layer(kind, keep=0.0, bias=bias))
    net(x()).sum().backward()
    unused = {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None and "partial" not in name}
    assert not unused or (kind == "odconv" and bias and all(name.split(".")[1] in ("channel", "filter", "spatial") for name in unused))
    assert any(p.requires_grad for p in net.attention.parameters()) == bias


@pytest.mark.parametrize("scales", SCALES)
def test_gradients_of_the_equation(scales):
    """What the layer spares (products with the mask, a second pass for lambda_s) is not missing in gradients, nor in gradients of gradients."""
    net = layer(scales=scales)
    partial, mask, alpha = net.partial, net.partial.mask, net.alpha(x()).detach()
    leaves = [p for p in (net.weight, partial.static, partial.phi) if p is not None]

    def plain():
        dynamic, static = partial.scale()
        kernels = dynamic * mask * torch.einsum("bk,k...->b...", alpha, net.weight) + (0 if scales == "prune" else static * ~mask * partial.static)
        return torch.stack([F.conv2d(image, kernel, padding=1) for image, kernel in zip(x(), kernels, strict=True)])

    def spared():
        sets, weights, static = net.mixture(alpha)
        return dynamic_conv2d(x(), sets, weights, padding=1, static_OIhw=static)

    found = []
    for forward in (plain, spared):
        first = torch.autograd.grad(forward().pow(3).mean(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        found.append([*first, *second, *torch.autograd.grad(forward().pow(3).mean(), leaves)])
    torch.testing.assert_close(found[1], found[0])


def test_all_dynamic_is_the_dynamic_layer():
    for mask in (None, torch.ones(6, 4, 3, 3, dtype=torch.bool)):
        torch.manual_seed(0)
        partial = PartialConv2d(4, 6, 3, mask=mask).double()
        plain = DynamicConv2d(4, 6, 3).double()
        plain.load_state_dict({k: v for k, v in partial.state_dict().items() if not k.startswith("partial.")})
        torch.testing.assert_close(partial(x()), plain(x()), rtol=0, atol=0)
        assert partial.partial.static is None and partial.partial.mask is None
        nn.init.constant_(partial.partial.phi, 1.0)
        torch.testing.assert_close(partial(x()), 2 * torch.sigmoid(torch.tensor(1.0)).double() * plain(x()))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dynamic_is_a_static_convolution(kind):
    net = layer(kind, keep=None)
    static = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    net.partition(torch.zeros(6, 4, 3, 3, dtype=torch.bool), static)
    want = F.conv2d(x(), 2 * torch.sigmoid(torch.tensor(-0.5, dtype=torch.float64)) * static, padding=1)
    y = net(x())
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(compact(net)(x()), want, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    gradients = [net.weight.grad, *(p.grad for p in net.attention.parameters())]
    assert not net.weight.grad.any() and all(g is None or g.abs().max() < 1e-10 for g in gradients)


def test_equal_sets_make_mask_and_attention_irrelevant():
    net = layer(scales="none", keep=None)
    shared = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.weight += shared
    net.partition(torch.rand(6, 4, 3, 3) < 0.5, shared.clone())
    torch.testing.assert_close(net(x()), F.conv2d(x(), shared, padding=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
], ids=["sgd", "adamw"])
def test_dead_entries_never_move(kind, optimizer):
    net = layer(kind, dtype=torch.float32).train()
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


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01)], ids=["sgd", "adamw"])
def test_an_optimiser_from_before_the_partition_moves_no_dead_entry(optimizer):
    """Its momentum of positions that are static now would."""
    net = layer(keep=None, dtype=torch.float32).train()
    steps = optimizer(net.parameters())
    for step in range(6):
        if step == 3:
            net.partition(torch.rand(6, 4, 3, 3) < 0.4)
        steps.zero_grad()
        net(x(dtype=torch.float32)).square().mean().backward()
        steps.step()
    assert not net.weight[:, ~net.partial.mask].any()
    torch.testing.assert_close(compact(net.eval())(x(dtype=torch.float32)), net(x(dtype=torch.float32)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.4, None])
def test_compact_is_the_masked_layer(kind, scales, expand, keep):
    net = layer(kind, keep, scales)
    small = compact(net, expand=expand)
    torch.testing.assert_close(small(x()), net(x()), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(small(x(1)), net(x(1)), rtol=1e-11, atol=1e-12)
    assert count_parameters(small)["stored"] == count_parameters(net)["stored"] == small.partial.num_stored + sum(p.numel() for p in net.attention.parameters())
    assert isinstance(small.partial, CompactBank) and net.weight.shape[0] == 4 and net.partial is not small.partial
    other = compact(layer(kind, None, scales), expand=not expand)  # sizes follow the file, whichever form wrote it
    other.load_state_dict(small.state_dict())
    torch.testing.assert_close(other(x()), net(x()), rtol=1e-11, atol=1e-12)


def network(keep=0.3, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), PartialConv2d(4, 6, 3, bias=True), nn.BatchNorm2d(6), nn.ReLU(), PartialConv2d(6, 6, 3, groups=2),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return model if keep is None else make_partial(model, None, None, keep=keep, method="random", **kwargs)


def test_files(tmp_path):
    model, images = network().eval(), torch.randn(2, 3, 9, 9)
    files = {}
    for expand in (False, True):
        files[expand] = tmp_path / f"{expand}.safetensors"
        save_file(compact(model, expand).state_dict(), files[expand])
        again = compact(network(None).eval(), expand)
        again.load_state_dict(load_file(files[expand]))
        torch.testing.assert_close(again(images), model(images))
    assert files[False].read_bytes() == files[True].read_bytes()
    save_file(model.state_dict(), tmp_path / "masked.safetensors")
    again = network(None).eval()  # fully dynamic: modes come out of the file
    again.load_state_dict(load_file(tmp_path / "masked.safetensors"))
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    assert count_parameters(again) == count_parameters(model)


def test_damaged_files_are_refused():
    state = compact(network()).state_dict()
    state["1.partial.bits"][0] ^= 1  # one bit alone: of many, as many could be lost as won
    says = r"1.partial.: the bits say \d+ of 216 positions; dynamic torch.float32 \[4, \d+\] and static torch.float32 \[\d+\] do not fit 4 sets"
    with pytest.raises(RuntimeError, match=says):
        compact(network(None)).load_state_dict(state)
    del state["1.partial.bits"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"1.partial.bits\""):
        compact(network(None)).load_state_dict(state)


@pytest.mark.parametrize("name, change", [
    ("static", lambda t: t.sum()), ("static", lambda t: t[:, None]), ("static", lambda t: t[:0]), ("dynamic", lambda t: t.long()), ("dynamic", lambda t: t[:2]),
], ids=["a number", "two axes", "empty", "integers", "fewer sets"])
def test_compact_values_of_another_form_are_refused(name, change):
    state = compact(network()).state_dict()
    state[f"1.partial.{name}"] = change(state[f"1.partial.{name}"])
    with pytest.raises(RuntimeError, match=r"1.partial.: the bits say .* do not fit 4 sets"):
        compact(network(None)).load_state_dict(state)


@pytest.mark.parametrize("change, says", [
    (lambda state: state.update({"1.partial.mask": torch.zeros(1, dtype=torch.bool)}), r"must be bool \[6, 4, 3, 3\], one set .* got torch.bool \[1\]"),
    (lambda state: state.update({"1.partial.mask": state["1.partial.mask"].float()}), r"must be bool .* got torch.float32"),
    (lambda state: state.pop("1.partial.static"), "1.partial has scales='both', and the file no static values"),
])
@pytest.mark.parametrize("keep", [None, 0.3])
def test_masked_files_that_do_not_fit_are_refused(change, says, keep):
    state = dict(network().state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=says):
        network(keep).load_state_dict(state, strict=False)


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_loading_keeps_the_compact_parameters_and_their_training(keep):
    model, source = compact(network()), compact(network(keep))
    model[4].requires_grad_(False)
    steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.load_state_dict(source.state_dict())
    assert not any(p.requires_grad for p in model[4].parameters())
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    before = [p.detach().clone() for p in model[1].partial.parameters()]
    steps.step()
    assert all(not torch.equal(old, p) for old, p in zip(before, model[1].partial.parameters(), strict=True))


def test_compact_weights_that_are_frozen_or_empty_are_not_trained():
    frozen = network()
    frozen.requires_grad_(False)
    assert not any(p.requires_grad for p in compact(frozen).parameters())
    for keep in (0.0, 1.0):
        net = layer(keep=keep)
        made = dict(compact(net).partial.named_parameters())
        assert [made[name].requires_grad for name in ("dynamic", "static")] == [keep == 1.0, keep == 0.0]
    other = compact(layer(keep=0.0))
    other.load_state_dict(compact(layer(keep=0.4)).state_dict())
    assert other.partial.dynamic.requires_grad and other.partial.dynamic.numel()


@pytest.mark.parametrize("expand", [False, True])
def test_compact_files_are_assigned_to_what_has_no_memory(expand):
    model, images = network().eval(), torch.randn(2, 3, 9, 9)
    state = compact(model).state_dict()
    bare = compact(network(0.6).eval(), expand).to("meta")
    bare.load_state_dict(state, assign=True)
    torch.testing.assert_close(bare(images), model(images))


@pytest.mark.parametrize("expand", [False, True])
def test_the_compact_model_exports(expand):
    model, images = network().eval(), torch.randn(2, 3, 9, 9)
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(compact(model, expand), (images,), dynamic_shapes=({0: batch},)).module()
    for other in (images, images[:1], torch.cat([images] * 3)):  # any number of them
        torch.testing.assert_close(exported(other), model(other))


def test_the_compact_model_trains():
    model = compact(network())
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for m in model.modules() if isinstance(m, Banked) for p in m.partial.parameters())


@pytest.mark.parametrize("scales", SCALES)
def test_partial_layers_compile_whole(scales):
    net = layer(scales=scales)
    torch._dynamo.reset()  # graphs of other tests in this process count towards its limit
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x()), net(x()))
    small = compact(net)
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(x()), net(x()))
