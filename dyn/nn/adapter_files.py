"""Small files of one adapter: adapter.safetensors, head.safetensors and adapter.json in a folder (SparseAdapter sections 7.3 to 7.5).

adapter.safetensors holds three flat tensors: `mask`, one bit a prunable position; `values`, the survivors; `rest`, parameters without a mask. Where so few
survive that it is smaller, `columns` of the survivors (int16 or int32) and `rows` (int32 offsets, the rows of all matrices in order) stand for `mask`.
adapter.json says which parameters these are, in order, with shapes and precisions, what they were trained on, and the files' checksums.

N prunable positions, K survivors, R rows of all masked matrices, W the widest of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dyn.core.partition import pack_bits, unpack_bits
from dyn.nn.adapter_attach import adapter_parameters, adapters, attach, detach, head_parameters, hosts, keep_choice, refuse_merged, set_active
from dyn.nn.adapter_build import make_config
from dyn.nn.adapter_modules import AdapterModule
from dyn.nn.adapter_sites import modules_of, own_parameters
from dyn.nn.masked import dense_weights, drop_masks, masks, set_masks

_log = logging.getLogger(__name__)

FORMAT, VERSION = "dyn-adapter", 1
ADAPTER, HEAD, ABOUT = "adapter.safetensors", "head.safetensors", "adapter.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def save_adapter(model: nn.Module, d: str | Path, name: str = "default", *, dtype: torch.dtype | None = None) -> Path:
    """Write one adapter and its head into the folder `d`, whole or not at all; returns the folder.

    Args:
        model: with the adapter, pruned or not.
        d: a folder that does not exist, is empty, or holds an adapter, which is replaced.
        name: of the adapter.
        dtype: of the values, such as bfloat16; None: the parameters' own, so that what is read back is equal bit for bit. The head keeps its precision.

    Raises:
        ValueError: no such adapter, a `d` with other files, a merged LoRA, parameters that are on the meta device or sharded.
    """
    folder, parameters = Path(d), adapter_parameters(model, name)
    refuse_merged(model)
    if dtype not in (None, *WORDS):
        raise ValueError(f"dtype={dtype} of an adapter's file must be one of {', '.join(DTYPES)}")
    if meta := next((key for key, p in parameters.items() if p.is_meta), None):
        raise ValueError(f"{meta} is on the meta device: it has no values to save")
    if sharded := next((key for key, p in parameters.items() if hasattr(p, "full_tensor")), None):
        raise ValueError(f"{sharded} is sharded over processes; load a checkpoint into a model in one process, and save from there")
    host, short, held, dense = hosts().find_host(model), short_names(model, name), masks(model), dense_weights(model)
    values = {key: dense.get(key, p).detach() for key, p in parameters.items()}
    masked = {key: held[key] for key in parameters if key in held}
    wide = dtype or _widest(values.values())
    survivors = _flat([values[key][mask] for key, mask in masked.items()], wide)
    tensors = _layout(list(masked.values())) | {"values": survivors, "rest": _flat([v for key, v in values.items() if key not in masked], wide)}
    head = {short[key]: p.detach() for key, p in head_parameters(model, name).items()}
    files = {ADAPTER: save(tensors)} | ({HEAD: save({key: p.cpu().contiguous() for key, p in head.items()})} if head else {})
    lists = {"masked": [], "rest": []}
    for key, v in values.items():
        lists["masked" if key in masked else "rest"].append({"name": short[key], "shape": list(v.shape), "dtype": WORDS[v.dtype]})
    about = {"format": FORMAT, "version": VERSION, "name": name, "adapter": dataclasses.asdict(adapters(model)[name]), "host": host.identity(),
             "dtype": WORDS[wide], "kept": len(survivors), **lists, "head": {key: list(p.shape) for key, p in head.items()},
             "sha256": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}}
    about["sha256"][ABOUT] = _digest(about)
    replace_folder(folder, files | {ABOUT: (json.dumps(about, indent=1) + "\n").encode()})
    return folder


def load_adapter(model: nn.Module, d: str | Path, name: str | None = None, *, head: bool = True) -> nn.Module:
    """Read an adapter from a folder that `save_adapter` or peft (LoRA) wrote, and let it act; in place, returns the model.

    It is attached first where it is missing. One of that name that is attached is filled, if it is of the same configuration; then make the optimiser
    afterwards, since parameters that were pruned are new ones. Masks come in form "mask" (`dyn.nn.masking.set_masks` changes that).

    Args:
        model: a host like the one that it was saved from: another architecture is refused, other weights are reported in the log.
        d: the folder.
        name: to give it; None: the name that it was saved under.
        head: read the head too, where there is one in the folder.

    Raises:
        ValueError: a folder that holds no adapter, a file that is damaged, cut short or of another format or version, another host, other shapes, an adapter
            of another configuration under that name; the model is then as before.
    """
    folder = Path(d)
    if not (folder / ABOUT).is_file() and (folder / "adapter_config.json").is_file():
        from dyn.nn.adapter_peft import import_peft

        return import_peft(model, folder, "default" if name is None else name, head=head)
    about, tensors, head_tensors = _read(folder)
    name = about["name"] if name is None else name
    config, host = about["adapter"], hosts().find_host(model)
    identity = host.identity()
    for key in ("model_type", "hidden_size", "num_layers"):
        if about["host"].get(key) != identity[key]:
            raise ValueError(f"{folder} was saved from a host with {key} {about['host'].get(key)!r}; {type(host.model).__name__} has {identity[key]!r}")
    heads = {key: p for part in host.heads for key, p in _below(host.model, part).items()}
    head_tensors = head_tensors if head else {}
    if found := [key for key in dict.fromkeys([*heads, *head_tensors]) if head_tensors and _shape(head_tensors, key) != _shape(heads, key)]:
        raise ValueError(f"{folder}: its head has {found[0]} {_shape(head_tensors, found[0])}, {type(host.model).__name__} has {_shape(heads, found[0])}; "
                         "load_adapter(..., head=False) leaves the head out")
    state = _unpack(folder, about, tensors)
    there = adapters(model).get(name)
    restore = keep_choice(model)
    if there is None:
        # A seed, since reading a file should not move the random state.
        attach(model, config["kind"], name=name, head=head and config["head"], official=config["official"], layers=config["layers"], seed=0,
               dtype=_widest([value for value, _ in state.values()]), **config["flags"])
    else:
        wanted = make_config(config["kind"], config["flags"], host, official=config["official"], head=there.head, layers=config["layers"])
        if wanted != there:
            raise ValueError(f"{folder} holds {wanted}; the adapter {name!r} that is attached is {there}")
        if head_tensors and not there.head:
            raise ValueError(f"{folder} has a head, the adapter {name!r} that is attached has none; attach(..., head=True), or load_adapter(..., head=False)")
        refuse_merged(model)
    try:
        _fill(model, name, folder, state, resize=there is None)
    except ValueError:
        if there is None:
            detach(model, name)
            restore()
        raise
    set_active(model, name)
    short = short_names(model, name)
    with torch.no_grad():
        for key, p in head_parameters(model, name).items():
            if short[key] in head_tensors:
                p.copy_(head_tensors[short[key]])
    if about["host"].get("weights") != identity["weights"] and None not in (about["host"].get("weights"), identity["weights"]):
        _log.warning("load_adapter: %s was trained on other weights than those of this %s", folder, type(host.model).__name__)
    return model


def mask_bytes(masks: Sequence[Tensor]) -> dict[str, int]:
    """Bytes that masks take as bits and as sparse rows: {"bits": ..., "rows": ...}; the smaller one is what `save_adapter` writes."""
    total, kept, rows, width = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks), sum(map(_rows, masks)), max(map(_width, masks), default=0)
    return {"bits": -(-total // 8), "rows": kept * (2 if width <= 2**15 else 4) + 4 * (rows + 1)}


def _rows(mask: Tensor) -> int:
    return mask.shape[0] if mask.ndim > 1 else 1


def _width(mask: Tensor) -> int:
    return mask.numel() // max(1, _rows(mask))


def _flat(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.detach().flatten().to("cpu", dtype) for part in parts]) if parts else torch.empty(0, dtype=dtype)


def _widest(values: Any) -> torch.dtype:
    dtypes = list({v.dtype for v in values})
    wide = dtypes[0]
    for other in dtypes[1:]:
        wide = torch.promote_types(wide, other)
    return wide


def _layout(masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Where the survivors are, in the smaller of two ways."""
    masks = [m.cpu() for m in masks]
    size = mask_bytes(masks)
    if not masks or size["bits"] <= size["rows"]:
        return {"mask": pack_bits(torch.cat([m.flatten() for m in masks])) if masks else torch.empty(0, dtype=torch.uint8)}
    matrices = [m.reshape(_rows(m), -1) for m in masks]
    columns = torch.cat([m.nonzero()[:, 1] for m in matrices]).to(torch.int16 if max(map(_width, masks)) <= 2**15 else torch.int32)
    ends = torch.cat([m.sum(1) for m in matrices]).cumsum(0)
    return {"columns": columns, "rows": torch.cat([ends.new_zeros(1), ends]).to(torch.int32)}


def short_names(model: nn.Module, name: str) -> dict[str, str]:
    """Keys in the model -> names in a file: from the base model on (the head's from the host on), without the adapter's own name."""
    host = hosts().find_host(model)
    base, top = (next(path for path, m in model.named_modules() if m is wanted) for wanted in (host.model.base_model, host.model))
    names = {}
    for path, module in modules_of(model, name).items():
        start = base if isinstance(module, AdapterModule) else top
        place = path.removesuffix(f".{name}").removeprefix(f"{start}." if start else "")
        for key, _ in module.named_parameters():
            names[f"{path}.{key}"] = f"{place}.{key}" if isinstance(module, AdapterModule) else f"{place.removesuffix('.heads')}.{key}"
    return {key: key.removeprefix(f"{top}." if top else "") for key in head_parameters(model, name)} | names


def _below(host: nn.Module, part: nn.Module) -> dict[str, Tensor]:
    path = next(path for path, m in host.named_modules() if m is part)
    return {f"{path}.{key}": p for key, p in own_parameters(part).items()}


def _shape(tensors: Mapping[str, Tensor], key: str) -> list[int] | str:
    return list(tensors[key].shape) if key in tensors else "nothing"


def _digest(about: Mapping[str, Any]) -> str:
    """Of everything that adapter.json says, its own checksum apart."""
    said = about | {"sha256": {file: digest for file, digest in about["sha256"].items() if file != ABOUT}}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def replace_folder(folder: Path, files: Mapping[str, bytes], own: Sequence[str] = (ADAPTER, HEAD, ABOUT)) -> None:
    """Make `folder` hold these files, by renaming: at any moment the old ones or the new ones are whole.

    Raises:
        ValueError: the folder holds others than `own`.
    """
    other = [folder.name] if folder.is_file() else sorted({p.name for p in folder.glob("*")} - {*own})
    if other:
        raise ValueError(f"{folder} holds other things ({', '.join(other[:3])}); give an adapter a folder of its own")
    folder = folder.absolute()
    if folder.is_dir() and folder.samefile(Path.cwd()):
        raise ValueError(f"{folder} is the current directory, which cannot be replaced whole; give an adapter a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # a name of its own: what lies beside may be anyone's
    part, old = room / "new", room / "old"
    try:
        part.mkdir()
        for file, data in files.items():
            (part / file).write_bytes(data)
        if folder.is_dir():
            folder.replace(old)
        part.replace(folder)
    finally:
        if old.is_dir() and not folder.is_dir():
            old.replace(folder)
        shutil.rmtree(room, ignore_errors=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """adapter.json and the tensors of both files, checksums compared."""
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{folder} holds no adapter: there is no {ABOUT}")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / ABOUT} is damaged: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{folder / ABOUT} is not of the format {FORMAT!r}")
    if about.get("version") != VERSION:
        raise ValueError(f"{folder / ABOUT} has version {about.get('version')!r}; this code reads {VERSION}")
    digests = about.get("sha256")
    if not isinstance(digests, dict) or digests.get(ABOUT) != _digest(about):
        raise ValueError(f"{folder / ABOUT} is damaged or was edited: its checksum is another")
    found: dict[str, dict[str, Tensor]] = {HEAD: {}}
    for file in (ADAPTER, HEAD):
        if file not in digests and file == HEAD:
            continue
        if file not in digests or not (folder / file).is_file():
            raise ValueError(f"{folder} is not whole: {file} is missing")
        data = (folder / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != digests[file]:
            raise ValueError(f"{folder / file} is damaged, cut short, or of another adapter: its checksum is not the one in {ABOUT}")
        try:
            found[file] = load(data)
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged: {error}") from None
    return about, found[ADAPTER], found[HEAD]


def _unpack(folder: Path, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Name -> (value in its own precision, mask or None). ValueError where sizes contradict each other."""
    masked, rest = ([(entry["name"], tuple(entry["shape"]), DTYPES[entry["dtype"]]) for entry in about[part]] for part in ("masked", "rest"))
    sizes = [math.prod(shape) for _, shape, _ in masked]
    try:
        if "mask" in tensors:
            bits_N = unpack_bits(tensors["mask"], (sum(sizes),))
        else:
            bits_N = _from_rows(tensors["columns"].long(), tensors["rows"].long(), [shape for _, shape, _ in masked])
        kept, plain = int(bits_N.sum()), sum(math.prod(shape) for _, shape, _ in rest)
        if (kept, plain) != (len(tensors["values"]), len(tensors["rest"])):
            raise ValueError(f"{kept} survivors and {plain} other values are announced, {len(tensors['values'])} and {len(tensors['rest'])} are there")
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} contradicts itself: {error}") from None
    dense_N = tensors["values"].new_zeros(len(bits_N)).masked_scatter_(bits_N, tensors["values"])
    state: dict[str, tuple[Tensor, Tensor | None]] = {}
    for (name, shape, dtype), value, mask in zip(masked, dense_N.split(sizes), bits_N.split(sizes), strict=True):
        state[name] = value.view(shape).to(dtype), mask.view(shape)
    for (name, shape, dtype), value in zip(rest, tensors["rest"].split([math.prod(shape) for _, shape, _ in rest]), strict=True):
        state[name] = value.view(shape).to(dtype), None
    return state


def _from_rows(columns_K: Tensor, rows: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    widths = torch.cat([torch.full((shape[0] if len(shape) > 1 else 1,), math.prod(shape[1:]) if len(shape) > 1 else shape[0]) for shape in shapes])
    counts = rows.diff()
    if len(counts) != len(widths) or rows[0] != 0 or (counts < 0).any() or rows[-1] != len(columns_K):
        raise ValueError(f"the offsets of {len(widths)} rows do not lead through {len(columns_K)} columns")
    if ((columns_K < 0) | (columns_K >= widths.repeat_interleave(counts))).any():
        raise ValueError("a column lies beyond its row")
    bits_N = torch.zeros(int(widths.sum()), dtype=torch.bool)
    bits_N[(widths.cumsum(0) - widths).repeat_interleave(counts) + columns_K] = True
    return bits_N


@torch.no_grad()
def _fill(model: nn.Module, name: str, folder: Path, state: Mapping[str, tuple[Tensor, Tensor | None]], resize: bool) -> None:
    """Values and masks into an attached adapter whose parameters must be those of the file, all checked before any is written."""
    short = short_names(model, name)
    if resize:
        for path, module in modules_of(model, name).items():
            keys = {key: short[f"{path}.{key}"] for key, _ in module.named_parameters()}
            if isinstance(module, AdapterModule) and all(entry in state for entry in keys.values()):
                module.resize({key: state[entry][0].shape for key, entry in keys.items()})
    held = masks(model)
    keys = {short[key]: key for key in adapter_parameters(model, name)}
    shapes = {short[key]: list(held[key].shape if key in held else p.shape) for key, p in adapter_parameters(model, name).items()}
    for entry in dict.fromkeys([*state, *keys]):
        has, needs = list(state[entry][0].shape) if entry in state else "nothing", shapes.get(entry, "nothing")
        if has != needs:
            raise ValueError(f"{folder} does not fit {type(model).__name__}: {entry} is {has} in the file, {needs} in the model")
    for module in modules_of(model, name).values():
        if isinstance(module, AdapterModule):
            drop_masks(module)
    for key, p in adapter_parameters(model, name).items():
        p.copy_(state[short[key]][0])
    set_masks(model, {keys[entry]: mask for entry, (_, mask) in state.items() if mask is not None})
