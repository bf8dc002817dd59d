"""A mask on a parameter: keys and buffers, both forms, copies, files of either form, what other readers see, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyn.core.partition import mask_hash, pack_bits
from dyn.nn.count import count_parameters
from dyn.nn.masked import apply_masks, dense_weight, dense_weights, drop_masks, flat_matrices, masks, set_masks
from dyn.train.optim import param_groups


class Net(nn.Module):
    """A linear pair, and a module with several weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.pair = nn.Linear(6, 4), nn.Linear(4, 6), Pair()

    def forward(self, x):
        return self.pair(self.up(self.down(x).relu()))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        return (x @ self.key.T).softmax(-1) @ self.value


KEYS = ("down.weight", "up.weight", "pair.key", "pair.value", "down.bias")


def some(model, keys=KEYS, share=0.5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {key: torch.rand(model.get_parameter(key).shape, generator=g) < share for key in keys}


def data(n=8):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(2))


def train(model, steps=20, make=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), clip=0.0, x=None, accumulate=1):
    optimizer = make(model.parameters())
    for step in range(steps):
        (model(data() if x is None else x) - 1).square().mean().backward()
        if step % accumulate == accumulate - 1:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def test_keys_stay_and_masks_lie_beside():
    model = Net()
    names, wanted = list(model.state_dict()), some(model)
    set_masks(model, wanted)
    assert [k for k in model.state_dict() if "mask" not in k] == names
    assert {k for k in model.state_dict() if "mask" in k} == {"down.mask", "up.mask", "pair.key_mask", "pair.value_mask", "down.bias_mask"}
    found = masks(model)
    assert list(found) == [n for n, _ in model.named_parameters() if n in KEYS] and all(torch.equal(found[k], wanted[k]) for k in KEYS)
    assert all(not model.get_parameter(k)[~m].any() and model.get_parameter(k)[m].all() for k, m in wanted.items())
    assert mask_hash(found) == mask_hash(wanted) != mask_hash(some(model, seed=3))


def test_a_file_without_masks_leaves_pruned_weights_at_zero():
    model, dense = Net(), Net()
    set_masks(model, some(model))
    model.load_state_dict(dense.state_dict(), strict=False)
    for key, mask in some(model).items():
        assert torch.equal(model.get_parameter(key), dense.get_parameter(key).where(mask, 0))


def test_bits_of_the_flat_form():
    model, wanted = Net(), some(Net())
    dense = {k: model.get_parameter(k).detach().clone() for k in KEYS}
    set_masks(model, wanted, "flat")
    for key, mask in wanted.items():
        count = int(mask.sum())
        values = model.get_parameter(key)
        assert values.shape == (count + -count % 32,) and torch.equal(values[:count], dense[key][mask]) and not values[count:].any()
        assert torch.equal(dense_weights(model)[key], dense[key] * mask)
    assert torch.equal(model.up.bits, pack_bits(wanted["up.weight"])) and "pair.key_bits" in model.state_dict()
    assert all(torch.equal(m, wanted[k]) for k, m in masks(model).items())


@pytest.mark.parametrize("form", ["mask", "flat"])
def test_the_forward_pass_sees_the_mask_and_gradients_are_those_of_survivors(form):
    model, x = Net(), data()
    wanted = some(model)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for key, mask in wanted.items():
            plain.get_parameter(key).mul_(mask)
    plain(x).square().sum().backward()
    set_masks(model, wanted, form)(x).square().sum().backward()
    for key, mask in wanted.items():
        expected = plain.get_parameter(key).grad
        got = model.get_parameter(key).grad
        assert torch.equal(got if form == "mask" else got[: mask.sum()], torch.where(mask, expected, 0) if form == "mask" else expected[mask])


@pytest.mark.parametrize("settings", [
    dict(), dict(clip=0.01), dict(accumulate=4), dict(make=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    dict(make=lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=0.1)), dict(make=lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, fused=True))],
    ids=["plain", "clipped", "accumulated", "sgd", "nadam", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pruned_weights_and_their_moments_stay_zero(settings, dtype):
    model = Net().to(dtype)
    wanted = some(model)
    set_masks(model, wanted)
    before = {k: model.get_parameter(k).clone() for k in KEYS}
    optimizer = train(model, x=data().to(dtype), **settings)
    for key, mask in wanted.items():
        p = model.get_parameter(key)
        assert not p[~mask].any() and not torch.equal(p, before[key])
        moments = [m for m in optimizer.state[p].values() if isinstance(m, torch.Tensor) and m.shape == p.shape]
        assert moments and all(not m[~mask].any() and m[mask].any() for m in moments)


def test_autocast_and_anomalies_in_the_gradient():
    model, wanted = Net(), some(Net())
    set_masks(model, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        model(data()).float().square().sum().backward()
    assert not model.down.weight.grad[~wanted["down.weight"]].any()
    model.zero_grad()
    (model(data()) * torch.inf).sum().backward()  # a step that a loss scaler would leave out: pruned positions are 0 all the same, not NaN
    assert not model.up.weight.grad[~wanted["up.weight"]].any() and not model.up.weight.grad.isfinite().all()


def test_flat_linear_layers_hold_no_dense_weight_between_the_passes():
    layer, x = nn.Linear(96, 64), torch.randn(3, 5, 96, requires_grad=True)
    set_masks(layer, {"weight": torch.rand(64, 96) < 0.25}, "flat")
    known, others = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.bits)}, []

    def pack(t):
        others.extend([t.shape] if t.untyped_storage().data_ptr() not in known else [])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    out.sum().backward()
    assert others == [] and x.grad.shape == x.shape


def test_flat_linear_layers_have_first_and_second_derivatives():
    layer = nn.Linear(6, 4).double()
    set_masks(layer, {"weight": torch.rand(4, 6) < 0.6}, "flat")
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    used = int(masks(layer)["weight"].sum())

    def run(x, values, bias):
        return torch.func.functional_call(layer, {"weight": F.pad(values, (0, 32 - used)), "bias": bias}, (x,)).square()

    given = (x, layer.weight.detach()[:used].clone().requires_grad_(), layer.bias)
    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)


def test_both_forms_under_autocast():
    grads = []
    for form in ("mask", "flat"):
        model = set_masks(Net(), some(Net()), form)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(data())
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append([out, *(model.get_parameter(k).grad[m if form == "mask" else slice(int(m.sum()))] for k, m in masks(model).items())])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*grads, strict=True))


def test_optimisers_that_mix_elements_are_mended():
    model, wanted = Net(), some(Net())
    set_masks(model, wanted)
    (model(data()) - 1).square().mean().backward()
    torch.optim.Muon([model.down.weight, model.up.weight], lr=0.1).step()
    assert model.down.weight[~wanted["down.weight"]].any()
    with torch.no_grad():
        assert torch.equal(dense_weight(model.down), model.down.weight * wanted["down.weight"]), "the forward pass is right even before"
    apply_masks(model)
    assert not model.down.weight[~wanted["down.weight"]].any() and model.down.weight[wanted["down.weight"]].all()


@pytest.mark.parametrize("form", ["mask", "flat"])
def test_a_copy_is_whole(form):
    model = set_masks(Net(), some(Net()), form)
    twin = copy.deepcopy(model)
    x = data()
    model.down.weight.data.fill_(torch.nan)
    assert twin(x).isfinite().all() and model(x).isnan().any()
    train(twin)
    for key, mask in masks(twin).items():
        assert not dense_weights(twin)[key][~mask].any() and torch.equal(mask, masks(model)[key])


@pytest.mark.parametrize(("ours", "theirs"), [("mask", "mask"), ("mask", "flat"), ("flat", "mask"), ("flat", "flat")])
def test_files_of_either_form_are_read(ours, theirs):
    model, other = set_masks(Net(), some(Net(), share=0.3, seed=4), ours), set_masks(Net(), some(Net()), theirs)
    train(other)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(m, masks(other)[k]) and torch.equal(dense_weights(model)[k], dense_weights(other)[k]) for k, m in masks(model).items())
    assert torch.equal(model(data()), other(data()))
    train(model, 3)


def test_damaged_files_are_refused():
    flat, dense = set_masks(Net(), some(Net()), "flat"), set_masks(Net(), some(Net()))
    short = flat.state_dict() | {"down.weight": flat.down.weight[:-1].detach()}
    before = flat.down.weight.clone()
    with pytest.raises(RuntimeError, match=r"down\.weight: 13 positions survive by the bits, the file has 31 values"):
        flat.load_state_dict(short)
    assert torch.equal(flat.down.weight, before)
    with pytest.raises(RuntimeError, match=r"up\.weight: a mask of shape \[6, 4\] has 3 bytes"):
        dense.load_state_dict(flat.state_dict() | {"up.bits": flat.up.bits[:-1]})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"up\.mask"'):
        Net().load_state_dict(dense.state_dict())


def test_shared_weights_and_readers_past_the_call():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)  # reads its projection's weight itself
    head = nn.Linear(8, 8, bias=False)
    head.weight = attention.out_proj.weight
    model = nn.ModuleDict({"attention": attention, "head": head})
    mask = torch.rand(8, 8) < 0.5
    set_masks(model, {"attention.out_proj.weight": mask, "attention.in_proj_weight": torch.rand(24, 8) < 0.5})
    assert set(masks(model)) == {"attention.out_proj.weight", "attention.in_proj_weight"} and "head.mask" not in model.state_dict()
    assert "attention.mask" in model.state_dict()
    x = torch.randn(2, 3, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        head(attention(x, x, x)[0]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not model.get_parameter(k)[~m].any() and model.get_parameter(k)[m].all() for k, m in masks(model).items())
    with pytest.raises(ValueError, match=r"read by nn.MultiheadAttention past its module's call"):
        set_masks(model, {"attention.out_proj.weight": mask}, "flat")
    tied = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    tied["a"].weight = tied["b"].weight
    with pytest.raises(ValueError, match="is shared by 2 modules"):
        set_masks(tied, {"a.weight": mask}, "flat")
    assert not masks(drop_masks(model)) and [k for k in model.state_dict() if "mask" in k] == []


def test_a_norm_has_a_mask_for_its_weight_and_one_for_its_bias():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    nn.init.ones_(model[0].bias)
    wanted = {"0.weight": torch.tensor([1, 1, 0, 0]).bool(), "0.bias": torch.tensor([0, 1, 1, 1]).bool(), "1.bias": torch.tensor([1, 0, 0, 1]).bool()}
    set_masks(model, wanted)
    assert all(torch.equal(masks(model)[k], m) and torch.equal(model.get_parameter(k) != 0, m) for k, m in wanted.items())
    assert {k for k in model.state_dict() if "mask" in k} == {"0.weight_mask", "0.bias_mask", "1.bias_mask"} and not masks(drop_masks(model))


def test_shapes_alone():
    model = set_masks(nn.Linear(6, 4), {"weight": torch.rand(4, 6) < 0.5}, "flat").to("meta")
    assert model(torch.empty(2, 6, device="meta")).shape == (2, 4)


def test_masks_that_change_in_training_clear_the_moments():
    """Golden fact 20: without, pruned entries move."""
    def change(optimizer_too):
        model = set_masks(Net(), some(Net(), share=0.9))
        optimizer = train(model, 5)
        new = {k: m & some(model, seed=7)[k] for k, m in masks(model).items()}
        set_masks(model, new, optimizer=optimizer if optimizer_too else None)
        for _ in range(10):
            (model(data()) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return max(model.get_parameter(k)[~m].abs().max().item() for k, m in new.items())

    assert change(False) > 0 and change(True) == 0


def test_forms_change_into_each_other():
    model, wanted = Net(), some(Net())
    dense = dense_weights(set_masks(model, wanted))
    for form in ("flat", "mask", "flat"):
        set_masks(model, masks(model), form)
        assert all(torch.equal(w, dense[k]) for k, w in dense_weights(model).items()) and len(flat_matrices(model)) == (4 if form == "flat" else 0)
        assert len([k for k in model.state_dict() if k.endswith(("mask", "bits"))]) == len(KEYS)
    drop_masks(model)
    assert list(model.state_dict()) == list(Net().state_dict()) and torch.equal(model.down.weight, dense["down.weight"])
    train(model)
    assert model.down.weight.all()


def test_flat_matrices_decay_and_counts_leave_dead_positions_out():
    model, wanted = Net(), some(Net())
    total = count_parameters(model)["total"]
    dead = sum(int((~m).sum()) for m in wanted.values())
    set_masks(model, wanted)
    counted = count_parameters(model)
    assert (counted["total"], counted["trainable"], counted["stored"]) == (total, total - dead, total - dead)
    set_masks(model, wanted, "flat")
    counted = count_parameters(model)
    assert counted["trainable"] == counted["stored"] == total - dead
    decayed, rest = (group["params"] for group in param_groups(model, 0.1))
    assert {id(p) for p in decayed} == {id(model.get_parameter(k)) for k in KEYS if k != "down.bias"}
    assert {id(p) for p in rest} == {id(p) for k, p in model.named_parameters() if k in ("down.bias", "up.bias")}


def test_checkpointing_and_functional_calls():
    from torch.func import functional_call
    from torch.utils.checkpoint import checkpoint

    model = set_masks(Net(), some(Net()))
    x = data().requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    grads = {k: model.get_parameter(k).grad for k in KEYS}
    assert all(not grads[k][~m].any() for k, m in masks(model).items())
    ones = {k: torch.ones_like(p) for k, p in model.named_parameters()}
    seen = {k: m.float() for k, m in masks(model).items()}
    middle = F.linear(F.linear(x, seen["down.weight"], seen["down.bias"]).relu(), seen["up.weight"], ones["up.bias"])
    torch.testing.assert_close(functional_call(model, ones, (x,)), (middle @ seen["pair.key"].T).softmax(-1) @ seen["pair.value"])


def test_an_error_in_the_forward_pass_leaves_nothing_behind():
    model = set_masks(Net(), some(Net()))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert isinstance(model.down.weight, nn.Parameter) and "weight" not in vars(model.down)
    model(data())


@pytest.mark.parametrize(("wanted", "words"), [
    ({"down.wait": torch.ones(4, 6, dtype=torch.bool)}, r"Net has no parameter 'down\.wait' to mask; it has down\.weight"),
    ({"up.weight": torch.ones(4, 6, dtype=torch.bool)}, r"the mask of up\.weight must be bool \[6, 4\], as the parameter; got bool \[4, 6\]"),
    ({"up.weight": torch.ones(6, 4)}, r"must be bool \[6, 4\], as the parameter; got float32 \[6, 4\]"),
])
def test_refusals(wanted, words):
    model = Net()
    with pytest.raises(ValueError, match=words):
        set_masks(model, {"down.weight": torch.zeros(4, 6, dtype=torch.bool), **wanted})
    assert not masks(model) and model.down.weight.all()


def test_refusals_of_forms():
    model = Net()
    with pytest.raises(ValueError, match="form='sparse' is unknown; allowed: mask, flat"):
        set_masks(model, some(model), "sparse")
    with pytest.raises(ValueError, match="make it afterwards"):
        set_masks(model, some(model), "flat", optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"down.weight is in flat form, and its dense weight will be a new parameter"):
        flat = set_masks(Net(), some(model), "flat")
        set_masks(flat, some(model), optimizer=torch.optim.SGD(flat.parameters()))
    assert flat.down.weight.ndim == 1
    model.down.mask = 3
    with pytest.raises(ValueError, match="Linear has something else named 'mask', where the mask of its 'weight' belongs"):
        set_masks(model, some(model))
