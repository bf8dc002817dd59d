"""Identities that any routing and any experts obey, over random shapes (float64)."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dyn.core import routing
from dyn.ops.experts import experts
from dyn.ops.route import route

quick = settings(max_examples=25, deadline=None, database=None)


@st.composite
def layers(draw):
    """backend, k, and float64 x [T, D], gate_up [E, 2F, D], down [E, D, F], logits [T, E], well scaled."""
    T, D, width, E = (draw(st.integers(1, high)) for high in (9, 7, 6, 6))
    k = draw(st.integers(1, E))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shapes = ((T, D), (E, 2 * width, D), (E, D, width), (T, E))
    return draw(st.sampled_from(["eager", "torch"])), k, *(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@quick
@given(layers())
def test_all_experts_with_weight_one_are_the_dense_network(layer):
    backend, _, x, gate_up, down, logits = layer
    T, E = logits.shape
    gate, up = gate_up.chunk(2, dim=1)
    dense = F.linear(F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1)), down.transpose(0, 1).flatten(1))
    idx = torch.stack([torch.randperm(E) for _ in range(T)])
    close(experts(x, gate_up, down, idx, torch.ones(T, E, dtype=torch.float64), backend), dense)


@quick
@given(layers(), st.randoms(use_true_random=False))
def test_renumbering_experts_with_their_ids_changes_nothing(layer, random):
    backend, k, x, gate_up, down, logits = layer
    idx, weight = route(logits, k)
    new_of_old = torch.tensor(random.sample(range(len(down)), len(down)))
    old_of_new = new_of_old.argsort()
    renumbered = experts(x, gate_up[old_of_new], down[old_of_new], new_of_old[idx], weight, backend)
    close(renumbered, experts(x, gate_up, down, idx, weight, backend))


@quick
@given(layers())
def test_order_of_slots_and_tokens_does_not_matter(layer):
    backend, k, x, gate_up, down, logits = layer
    idx, weight = route(logits, k)
    y = experts(x, gate_up, down, idx, weight, backend)
    close(experts(x, gate_up, down, idx.flip(1), weight.flip(1), backend), y)
    close(experts(x.flip(0), gate_up, down, idx.flip(0), weight.flip(0), backend).flip(0), y)


@quick
@given(layers())
def test_linear_in_the_weights_and_in_the_down_projection(layer):
    backend, k, x, gate_up, down, logits = layer
    idx, weight = route(logits, k)
    y = experts(x, gate_up, down, idx, weight, backend)
    close(experts(x, gate_up, down, idx, 3 * weight, backend), 3 * y)
    close(experts(x, gate_up, -0.5 * down, idx, weight, backend), -0.5 * y)
    first = experts(x, gate_up, down, idx[:, :1], weight[:, :1], backend)
    rest = experts(x, gate_up, down, idx[:, 1:], weight[:, 1:], backend) if k > 1 else 0
    close(first + rest, y)


@quick
@given(layers())
def test_an_id_past_the_last_expert_is_a_slot_of_weight_zero(layer):
    backend, k, x, gate_up, down, logits = layer
    idx, weight = route(logits, k)
    skip = torch.arange(idx.numel()).view(idx.shape) % 3 == 0
    skipped = experts(x, gate_up, down, idx.masked_fill(skip, len(down) + 2), weight, backend)
    close(skipped, experts(x, gate_up, down, idx, weight.masked_fill(skip, 0), backend))


@quick
@given(layers())
def test_route_is_softmax_top_k_renormalise(layer):
    """Golden fact 4, and that the choice is the k largest in falling order."""
    _, k, *_, logits = layer
    idx, weight = route(logits, k)
    probs, order = logits.softmax(-1).topk(k)
    assert torch.equal(idx, order)
    torch.testing.assert_close(weight, probs / probs.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.sum(-1), torch.ones(len(weight), dtype=torch.float64), rtol=1e-12, atol=0)


@quick
@given(layers(), st.floats(-5, 5), st.floats(0.1, 3))
def test_statistics_ignore_a_constant_and_count_every_assignment(layer, shift, std):
    """Golden fact 21 for any shape; sum of hard loads = k T; sum of importances = T; 0 <= soft load <= T."""
    *_, logits = layer
    k, (T, E) = layer[1], logits.shape
    idx, weight = route(logits, k)
    moved_idx, moved_weight = route(logits + shift, k)
    assert torch.equal(idx, moved_idx)
    close(moved_weight, weight)
    assert routing.hard_load(idx, E).sum() == k * T
    close(routing.importance(idx, weight, E).sum(), torch.tensor(float(T), dtype=torch.float64))
    close(routing.switch_loss(logits + shift, idx), routing.switch_loss(logits, idx))
    if k < E:
        noisy, std = logits + torch.randn_like(logits), torch.full_like(logits, std)
        load = routing.soft_load(logits, noisy, std, k)
        assert (load >= 0).all() and (load <= T).all()
        close(routing.soft_load(logits + shift, noisy + shift, std, k), load)


@quick
@given(st.integers(2, 12), st.integers(1, 12), st.floats(1, 1e4))
def test_cv_squared_of_an_equal_share(E, used, share):
    """With `used` of E experts sharing equally, CV^2 = (E / used) * (E - used) / (E - 1); the scale does not enter (but for the 1e-10)."""
    used = min(used, E)
    u = torch.zeros(E, dtype=torch.float64)
    u[:used] = share
    expected = E / used * (E - used) / (E - 1)
    torch.testing.assert_close(routing.cv_squared(u).item(), expected, rtol=1e-7, atol=1e-12)


@quick
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 12), st.integers(0, 2**16))
def test_capacity_is_filled_and_never_passed_and_padding_comes_last(T, E, most, seed):
    g = torch.Generator().manual_seed(seed)
    chosen, mask = torch.randint(0, E, (T,), generator=g), torch.rand(T, generator=g) < 0.5
    kept = routing.within_capacity(chosen, most, mask)
    load, real = torch.bincount(chosen, minlength=E), torch.bincount(chosen[mask], minlength=E)
    assert torch.equal(torch.bincount(chosen[kept], minlength=E), load.clamp(max=most))
    assert torch.equal(torch.bincount(chosen[kept & mask], minlength=E), real.clamp(max=most))
    assert torch.equal(routing.within_capacity(chosen, T), torch.ones(T, dtype=torch.bool))
