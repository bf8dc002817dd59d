"""save_adapter and load_adapter: bit for bit, small, whole or not at all, and refused with the reason."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from dyn.core.partition import keep_masks
from dyn.nn.adapter import adapter_parameters, adapters, attach, head_parameters, load_adapter, merge, save_adapter, set_active
from dyn.nn.adapter_build import FLAGS
from dyn.nn.adapter_files import mask_bytes
from dyn.nn.adapter_sites import adapter_modules, sites
from dyn.nn.masking import dense_weights, masks, prune, set_masks

KINDS = [kind for kind in FLAGS if kind != "fusion"]


def stir(model, name="default", dtype=None):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*adapter_parameters(model, name).values(), *head_parameters(model, name).values()):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def pruned(model, keep=0.6, **options):
    return prune(model, method="random", keep=keep, prefix=True, **options)


def seen(model, name="default"):
    """What the forward pass sees of an adapter and its head."""
    dense = dense_weights(model)
    return {key: dense.get(key, p).detach() for key, p in (adapter_parameters(model, name) | head_parameters(model, name)).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(t, right[key]) and t.dtype == right[key].dtype for key, t in left.items())


@pytest.mark.parametrize("form", ["dense", "mask", "flat", "unit"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_exact(tiny_host, tiny_text, tmp_path, kind, form):
    if form == "unit" and kind in ("prefix", "mam"):
        pytest.skip("a prefix has no units")
    model = stir(attach(tiny_host(), kind, 8))
    if form != "dense":
        pruned(model, form=form) if form != "unit" else prune(model, method="random", keep=0.5, form="unit")
    folder = save_adapter(model, tmp_path / "a")
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    assert {p.name for p in folder.iterdir()} == {"adapter.json", "adapter.safetensors", "head.safetensors"}
    assert load_file(folder / "adapter.safetensors").keys() == {"mask", "values", "rest"}
    again, random = tiny_host(), torch.get_rng_state()
    load_adapter(again, folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(seen(again), seen(model)) and same(masks(again), masks(model))
    assert adapters(again) == adapters(model) and all(p.requires_grad for p in adapter_parameters(again).values())
    assert torch.equal(again(**tiny_text())[0], model(**tiny_text())[0])
    save_adapter(again, tmp_path / "b")
    assert all((tmp_path / "b" / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())


@pytest.mark.parametrize("family", ["roberta", "electra", "albert", "distilbert", "bart", "llama", "qwen3"])
def test_every_host(tiny_host, tmp_path, family):
    model = pruned(stir(attach(tiny_host(family), "mam", 4)))
    save_adapter(model, tmp_path / "a")
    assert same(seen(load_adapter(tiny_host(family), tmp_path / "a")), seen(model))


def test_into_another_class_and_name_and_beside_others(tiny_host, tiny_text, tmp_path):
    model = pruned(stir(attach(tiny_host(), "houlsby", 4)))
    save_adapter(model, tmp_path / "a")
    base = load_adapter(tiny_host(task="base"), tmp_path / "a", "mine", head=False)
    expected = {key.removeprefix("bert.").replace(".default.", ".mine."): t for key, t in seen(model).items() if "classifier" not in key}
    assert same(seen(base, "mine"), expected)
    other = attach(tiny_host(), "lora", 4, "first")
    load_adapter(other, tmp_path / "a", "second")
    assert torch.allclose(other(**tiny_text())[0], model(**tiny_text())[0], atol=1e-6)
    set_active(other, "first")
    assert not torch.allclose(other(**tiny_text())[0], model(**tiny_text())[0], atol=1e-3)
    save_adapter(other, tmp_path / "b", "second")
    assert (tmp_path / "b" / "adapter.safetensors").read_bytes() == (tmp_path / "a" / "adapter.safetensors").read_bytes()
    assert load_file(tmp_path / "b" / "head.safetensors").keys() == load_file(tmp_path / "a" / "head.safetensors").keys()


def test_into_one_that_is_attached(tiny_host, tmp_path):
    model = pruned(stir(attach(tiny_host(), "houlsby", 4)))
    save_adapter(model, tmp_path / "a")
    fresh = [attach(tiny_host(), "houlsby", 4) for _ in range(3)]
    for other in (fresh[0], pruned(fresh[1], 0.3, form="flat"), pruned(fresh[2], 0.9)):
        assert same(seen(load_adapter(other, tmp_path / "a")), seen(model)) and same(masks(other), masks(model))
    save_adapter(stir(attach(tiny_host(), "houlsby", 4)), tmp_path / "dense")
    load_adapter(other, tmp_path / "dense")
    assert not masks(other)
    with pytest.raises(ValueError, match=r"holds .*'r': 4.*attached is .*'r': 8"):
        load_adapter(attach(tiny_host(), "houlsby", 8), tmp_path / "a")


def test_what_is_read_acts(tiny_host, tmp_path):
    model = attach(attach(tiny_host(), "houlsby", 4, "one"), "houlsby", 4, "two")
    save_adapter(model, tmp_path / "one", "one")
    load_adapter(model, tmp_path / "one")
    assert {tuple(site.acting()) for site in sites(model).values()} <= {("one",), ()} and any(site.acting() for site in sites(model).values())


def test_a_part_of_a_model_and_some_layers(tiny_host, tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

    model = stir(attach(Wrapped(tiny_host()), "houlsby", 4, layers=[1]))
    places = {key.split(".sequential")[0] for key in adapter_parameters(model)}
    assert places == {"net.bert.encoder.layer.1.output.dropout", "net.bert.encoder.layer.1.attention.output.dropout"}
    save_adapter(model, tmp_path / "a")
    again = load_adapter(tiny_host(), tmp_path / "a")
    assert same({f"net.{key}": t for key, t in seen(again).items()}, seen(model))


def test_fusion_and_reparametrised_prefix(tiny_host, tmp_path):
    model = tiny_host("bart")
    stir(attach(model, "prefix", 4, reparam=True, width=8))
    save_adapter(model, tmp_path / "p")
    assert same(seen(load_adapter(tiny_host("bart"), tmp_path / "p")), seen(model))
    model = attach(attach(tiny_host(), "pfeiffer", 4, "a"), "fusion", name="f", members=["a"])
    stir(prune(model, method="random", keep=0.6, fusion=True, name="f"), "a")
    save_adapter(model, tmp_path / "f", "f")
    with pytest.raises(ValueError, match="no adapter 'a' is attached; there are none"):
        load_adapter(tiny_host(), tmp_path / "f")
    assert same(seen(load_adapter(attach(tiny_host(), "pfeiffer", 4, "a"), tmp_path / "f"), "f"), seen(model, "f"))


def test_bfloat16(tiny_host, tmp_path):
    model = pruned(stir(attach(tiny_host(), "houlsby", 4)))
    save_adapter(model, tmp_path / "short", dtype=torch.bfloat16)
    again = load_adapter(tiny_host(), tmp_path / "short")
    head = head_parameters(model)
    assert same(seen(again), {key: t if key in head else t.bfloat16().float() for key, t in seen(model).items()})
    assert load_file(tmp_path / "short" / "adapter.safetensors")["values"].dtype == torch.bfloat16
    model = pruned(stir(attach(tiny_host().bfloat16(), "houlsby", 4)))
    save_adapter(model, tmp_path / "own")
    assert same(seen(load_adapter(tiny_host().bfloat16(), tmp_path / "own")), seen(model))
    model = pruned(stir(attach(tiny_host().bfloat16(), "mam", 4, dtype=torch.float32, scale="learnable", layer_norm="in")))
    save_adapter(model, tmp_path / "mixed")
    assert same(seen(load_adapter(tiny_host().bfloat16(), tmp_path / "mixed")), seen(model))


@pytest.mark.parametrize(("keep", "dtype", "limit", "exact"), [
    (0.6, None, 6_040_000, 6_037_096), (0.2, None, 2_265_000, 2_262_220),
    (0.6, torch.bfloat16, 3_170_000, 3_166_004), (0.2, torch.bfloat16, 1_280_000, 1_278_566), (None, torch.bfloat16, 2_700_000, 2_654_208 + 2 * 19_968),  # 2:4
])
def test_size_of_houlsby_64_on_bert_base(tmp_path, keep, dtype, limit, exact):
    """1 bit a weight, 4 bytes (2) a survivor and a bias, and a header."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    attach(model, "houlsby", 64)
    for m in adapter_modules(model).values():
        m.to_empty(device="cpu")
        m.draw("bert", torch.Generator().manual_seed(0))
    prune(model, method="magnitude", keep=keep, form="2:4" if keep is None else "mask")
    size = (save_adapter(model, tmp_path / "a", dtype=dtype) / "adapter.safetensors").stat().st_size
    assert exact < size <= min(limit, exact + 300)


def test_sparse_rows_where_they_are_smaller(tiny_host, tmp_path):
    shapes = [(64, 768), (768, 64)] * 24
    scores = {str(i): torch.rand(shape) for i, shape in enumerate(shapes)}
    at = {keep: mask_bytes(list(keep_masks(scores, keep).values())) for keep in (0.6, 0.4, 0.2, 0.1, 0.01)}
    assert all(at[keep]["bits"] == 294_912 < at[keep]["rows"] for keep in (0.6, 0.4, 0.2, 0.1))
    int32 = 4 * 1_415_578 + 4 * 1_415_578 + 4 * (19_968 + 1)  # as scipy has it, golden fact 26
    assert int32 == 11_404_500 == at[0.6]["rows"] + 2 * 1_415_578 + 4 * 1_415_578 > 4 * 2_359_296
    assert (at[0.01]["rows"] + 4 * 23_593) / (4 * 2_359_296) == pytest.approx(0.0235, abs=5e-5)
    assert at[0.01]["rows"] < at[0.01]["bits"]
    model = pruned(stir(attach(tiny_host(hidden_size=256, intermediate_size=64), "houlsby", 32)), 0.005)
    save_adapter(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / "adapter.safetensors").keys() == {"columns", "rows", "values", "rest"}
    again = load_adapter(tiny_host(hidden_size=256, intermediate_size=64), tmp_path / "a")
    assert same(seen(again), seen(model)) and same(masks(again), masks(model))


def test_replaced_whole(tiny_host, tmp_path, monkeypatch):
    model = pruned(stir(attach(tiny_host(), "houlsby", 4)))
    save_adapter(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).add_(1)

    def full(*_):
        raise OSError("no space")

    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            save_adapter(model, tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before and {p.name for p in tmp_path.iterdir()} == {"a"}
    save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() != before["adapter.safetensors"] and {p.name for p in tmp_path.iterdir()} == {"a"}
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other things \(notes\.txt\)"):
        save_adapter(model, tmp_path / "a")


def edit(folder, **changes):
    about = json.loads((folder / "adapter.json").read_text()) | changes
    (folder / "adapter.json").write_text(json.dumps(about))


def damage(folder, file, how):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2] if how == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


@pytest.mark.parametrize(("harm", "words"), [
    (lambda d: damage(d, "adapter.safetensors", "cut"), "adapter.safetensors is damaged, cut short"),
    (lambda d: damage(d, "adapter.safetensors", "flip"), "adapter.safetensors is damaged"),
    (lambda d: damage(d, "head.safetensors", "flip"), "head.safetensors is damaged"),
    (lambda d: damage(d, "adapter.json", "cut"), "adapter.json is damaged"),
    (lambda d: (d / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
    (lambda d: (d / "head.safetensors").unlink(), "head.safetensors is missing"),
    (lambda d: (d / "adapter.json").unlink(), "holds no adapter"),
    (lambda d: edit(d, format="peft"), "is not of the format 'dyn-adapter'"),
    (lambda d: edit(d, version=2), "version 2; this code reads 1"),
    (lambda d: edit(d, kept=3), "was edited"),
    (lambda d: (d / "adapter.json").write_text("[]"), "is not of the format"),
])
def test_damaged_files_are_refused(tiny_host, tmp_path, harm, words):
    save_adapter(pruned(stir(attach(tiny_host(), "houlsby", 4))), tmp_path / "a")
    harm(tmp_path / "a")
    model = tiny_host()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path / "a")
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("family", "settings", "words"), [
    ("roberta", {}, "host with model_type 'bert'; RobertaForSequenceClassification has 'roberta'"),
    ("bert", {"hidden_size": 64}, "host with hidden_size 32; .* has 64"),
    ("bert", {"num_hidden_layers": 3}, "host with num_layers 2; .* has 3"),
    ("bert", {"num_labels": 3}, r"its head has classifier.weight \[2, 32\], .* has \[3, 32\]; .*head=False"),
])
def test_another_host_is_refused(tiny_host, tmp_path, family, settings, words):
    save_adapter(stir(attach(tiny_host(), "houlsby", 4)), tmp_path / "a")
    model = tiny_host(family, **settings)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path / "a")
    assert list(model.state_dict()) == keys


def test_other_shapes_leave_the_model_as_it_was(tiny_host, tiny_text, tmp_path):
    save_adapter(stir(attach(tiny_host(), "lora", 4)), tmp_path / "h")
    bare = attach(tiny_host(), "lora", 4, head=False)
    with pytest.raises(ValueError, match=r"has a head, the adapter .default. that is attached has none"):
        load_adapter(bare, tmp_path / "h")
    load_adapter(bare, tmp_path / "h", head=False)
    save_adapter(stir(attach(tiny_host(), "lora", 4, where="ffn", head=False)), tmp_path / "a")
    plain, busy = tiny_host(intermediate_size=48), stir(attach(tiny_host(intermediate_size=48), "houlsby", 4, "mine"), "mine")
    for model in (plain, busy):
        keys, trained, said = list(model.state_dict()), [p.requires_grad for p in model.parameters()], model.eval()(**tiny_text()).logits
        with pytest.raises(ValueError, match=r"does not fit .*intermediate.dense.lora.B.weight is \[64, 4\] in the file, \[48, 4\] in the model"):
            load_adapter(model, tmp_path / "a")
        assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == trained
        assert torch.equal(model(**tiny_text()).logits, said)


def test_what_lies_beside_is_left_alone(tiny_host, tmp_path, monkeypatch):
    for name in ("run.old", "run.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text("mine")
    model = attach(tiny_host(), "lora", 4)
    for _ in range(2):
        save_adapter(model, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old", "run.part"] and (tmp_path / "run.old" / "data.txt").read_text() == "mine"
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(ValueError, match="is the current directory"):
        save_adapter(model, ".")


def test_other_weights_are_reported(tiny_host, tmp_path, caplog):
    save_adapter(stir(attach(tiny_host(), "houlsby", 4)), tmp_path / "a")
    load_adapter(tiny_host(), tmp_path / "a")
    load_adapter(tiny_host().bfloat16(), tmp_path / "a")
    assert not caplog.records
    load_adapter(tiny_host(seed=1), tmp_path / "a")
    assert "trained on other weights" in caplog.text


def test_what_cannot_be_saved(tiny_host, tmp_path):
    model = attach(tiny_host(), "lora", 4)
    with pytest.raises(ValueError, match="no adapter 'x'; attached: 'default'"):
        save_adapter(model, tmp_path / "a", "x")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        save_adapter(model, tmp_path / "a", dtype=torch.int8)
    with pytest.raises(ValueError, match="merged"):
        save_adapter(merge(model), tmp_path / "a")
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(attach(tiny_host(), "lora", 4).to("meta"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_masks_of_a_file_hold(tiny_host, tiny_text, tmp_path):
    """What was pruned stays zero while the loaded adapter trains on, and masks of the file replace others."""
    save_adapter(pruned(stir(attach(tiny_host(), "houlsby", 4))), tmp_path / "a")
    model = load_adapter(tiny_host(), tmp_path / "a")
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**tiny_text())[0].square().sum().backward()
        optimizer.step()
    found = masks(model)
    assert found and all((model.get_parameter(key)[~mask] == 0).all() and (model.get_parameter(key)[mask] != 0).any() for key, mask in found.items())
    assert sum(int(m.sum()) for m in found.values()) == math.ceil(0.6 * sum(m.numel() for m in found.values()) - 0.5)
    set_masks(model, {key: torch.ones_like(m) for key, m in found.items()})
