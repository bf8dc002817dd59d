"""taylor against its definition and against exact ablation of every neuron."""

import pytest
import torch
import torch.nn.functional as nnf

from dyn.core.saliency import METHODS, score, select, taylor


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randn(7, 5, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("use_value", [True, False])
@pytest.mark.parametrize(("kernel", "of"), [("plain", lambda x: x), ("l1", abs), ("l2", lambda x: x * x)])
def test_definition(pair, kernel, of, use_value):
    h_TN, grad_TN = pair
    expected = [
        sum(of(grad_TN[t, n].item() * (h_TN[t, n].item() if use_value else 1.0)) for t in range(7)) for n in range(5)
    ]
    score_N = taylor(h_TN, grad_TN, kernel=kernel, use_value=use_value)
    assert score_N.dtype == torch.float64 and score_N.tolist() == pytest.approx(expected, rel=1e-12)


def test_batches_add_up_and_positions_without_gradient_add_nothing(pair):
    h_TN, grad_TN = pair
    parts = sum(taylor(h, g) for h, g in zip(h_TN.split(3), grad_TN.split(3), strict=True))
    torch.testing.assert_close(parts, taylor(h_TN, grad_TN))
    grad_TN = grad_TN.index_fill(0, torch.tensor([2, 6]), 0.0)
    keep = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(taylor(h_TN, grad_TN), taylor(h_TN[keep], grad_TN[keep]))


def test_bfloat16_is_summed_in_float32():
    h_TN = torch.full((4096, 2), 0.01, dtype=torch.bfloat16)
    score_N = taylor(h_TN, torch.ones_like(h_TN))
    assert score_N.dtype == torch.float32
    assert score_N.tolist() == pytest.approx([4096 * h_TN[0, 0].item()] * 2, rel=1e-5)


def test_everything_is_put_back_around_buffers_that_share_memory():
    net = torch.nn.Linear(3, 2)
    net.register_buffer("shared", torch.zeros(1, 4).expand(3, 4))
    net.weight.requires_grad_(False)
    net.bias.grad = torch.ones(2)
    version = net.shared._version
    score(net, [torch.randn(4, 3)], lambda m, x: m(x).square().sum(), "snip", ["weight"])
    assert net.training and not net.weight.requires_grad and net.bias.requires_grad and net.bias.grad.all() and net.shared._version == version


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_what_runs_nothing_widens_nothing(method, monkeypatch):
    net, seen = torch.nn.Linear(3, 2).bfloat16(), []
    monkeypatch.setitem(METHODS, method, lambda model, *rest, of=METHODS[method]: seen.append(model.bias.dtype) or of(model, *rest))
    assert score(net, None, None, method)["weight"].dtype == torch.float32 and seen == [torch.bfloat16]


def test_a_tied_parameter_is_found_by_any_name():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    assert score(net, None, None, "magnitude", ["b.weight"]).keys() == {"b.weight"} and select(net, None).keys() == {"a.weight"}


def test_follows_exact_ablation_on_a_toy_network():
    g = torch.Generator().manual_seed(0)
    tokens, hidden, neurons, vocab = 256, 16, 48, 32
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x_TD, gate_ND, up_ND = draw(tokens, hidden), draw(neurons, hidden) / 4, draw(neurons, hidden) / 4
    out_VN, target_T = draw(vocab, neurons) / 7, torch.randint(0, vocab, (tokens,), generator=g)

    def loss_T(h_TN):
        return nnf.cross_entropy(h_TN @ out_VN.T, target_T, reduction="none")

    h_TN = (nnf.silu(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)).requires_grad_()
    loss_T(h_TN).sum().backward()
    score_N = taylor(h_TN, h_TN.grad)
    with torch.no_grad():
        zeroed = [h_TN.index_fill(1, torch.tensor([n]), 0.0) for n in range(neurons)]
        effect_N = torch.stack([(loss_T(h) - loss_T(h_TN)).abs().sum() for h in zeroed])
    assert torch.corrcoef(torch.stack((score_N, effect_N)))[0, 1] > 0.9
    assert not score_N.requires_grad


@pytest.mark.parametrize(
    ("h", "grad", "kernel", "message"),
    [
        ((3, 4), (3, 4), "l3", "kernel='l3'; allowed: 'plain', 'l1', 'l2'"),
        ((3, 4), (4, 3), "l1", r"h_TN \[3, 4\] and grad_TN \[4, 3\]"),
        ((1, 3, 4), (1, 3, 4), "l1", "tokens, neurons"),
    ],
)
def test_errors(h, grad, kernel, message):
    with pytest.raises(ValueError, match=message):
        taylor(torch.ones(h), torch.ones(grad), kernel=kernel)
