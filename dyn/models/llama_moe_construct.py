"""Expert construction: which neurons of a dense feed-forward make which expert, by every method of LLaMA-MoE section 1.

N neurons, D hidden size, E routed experts, F expert width, S shared neurons, L layers, T tokens. Adding a method: one function from
`LayerSource` to (shared_S, groups_EF), entered in METHODS; one that sees activations adds gate_ED.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyn.core import calibrate, split

Need = Literal["nothing", "scores", "coactivations", "activations"]
ROUNDS = 6  # of groups and gate in turn; the captured energy hardly rises after
MARKED = 0.1  # share of a token's neurons that count as active for `cmoe`
MANIFEST, INDEX = "construction.json", "construction.safetensors"


@dataclass(kw_only=True, slots=True)
class LayerSource:
    """One dense layer and what its split may look at."""

    gate_ND: Tensor
    up_ND: Tensor
    num_experts: int
    group_size: int
    num_shared: int
    overlap: bool
    features: Literal["up", "gate"]
    generator: torch.Generator
    scores_EN: Tensor | None = None
    adjacency_NN: Tensor | None = None
    sample: Sample | None = None


@dataclass(kw_only=True, slots=True)
class Sample:
    """What a layer, behind the layers already converted, does on a sample of calibration tokens; float32. Methods may overwrite it."""

    x_TD: Tensor  # normalised input
    h_TN: Tensor  # activations before the down projection
    omega_T: Tensor  # `dyn.core.calibrate.token_weights` of the dense model's stream behind the layer
    norm_N: Tensor  # norms of the down projection's columns
    num_experts_per_tok: int


def layer_source(config: Any, layer: int, gate_ND: Tensor, up_ND: Tensor, seed: int, *, overlap: bool = False, features: Literal["up", "gate"] = "gate",
                 **seen: Any) -> LayerSource:
    """A layer's weights, its sizes by a mixture's configuration, its generator, and what else a method has `seen` (scores, adjacency, sample)."""
    return LayerSource(gate_ND=gate_ND, up_ND=up_ND, num_experts=config.num_experts, group_size=config.of_layer("moe_intermediate_size", layer),
                       num_shared=config.of_layer("num_shared_experts", layer), overlap=overlap, features=features,
                       generator=generator(seed, "split", layer), **seen)


def _with_shared(source: LayerSource, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of E + shared groups, the first ones are shared."""
    return groups[: source.num_shared].reshape(-1).sort().values, groups[source.num_shared:]


def random(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Section 1.2, the released models' method."""
    return _with_shared(source, split.random(len(source.up_ND), source.num_experts + source.num_shared, generator=source.generator))


def kmeans(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Section 1.3: balanced k-means on the L2-normalised rows of the up (or gate) projection."""
    rows_ND = source.up_ND if source.features == "up" else source.gate_ND
    return _with_shared(source, split.kmeans(rows_ND.float(), source.num_experts + source.num_shared, generator=source.generator))


def coactivation(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Section 1.4: balanced partition of the graph of co-activations."""
    return _with_shared(source, split.coactivation(source.adjacency_NN, source.num_experts + source.num_shared, generator=source.generator))


def gradient(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Section 1.6: greedy assignment by importance."""
    return torch.empty(0, dtype=torch.int64), split.gradient(source.scores_EN)


def sharing_inner(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Section 1.7: every expert takes its own most important neurons."""
    return torch.empty(0, dtype=torch.int64), split.sharing_inner(source.scores_EN, source.group_size)


def sharing_inter(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Section 1.8: what most experts find important is shared, the rest is routed."""
    return split.sharing_inter(source.scores_EN, num_shared=source.num_shared, group_size=source.group_size, overlap=source.overlap)


def copy(source: LayerSource) -> tuple[Tensor, Tensor]:
    """Sparse upcycling: every expert is the whole feed-forward, or F random neurons of it where F is smaller."""
    units, device = len(source.up_ND), source.up_ND.device
    chosen = [torch.randperm(units, generator=source.generator)[: source.group_size].sort().values for _ in range(source.num_experts)]
    return torch.empty(0, dtype=torch.int64), torch.stack(chosen).to(device)


def calibrated(source: LayerSource) -> tuple[Tensor, Tensor, Tensor]:
    """Ours: groups that follow a gate that follows groups (`dyn.core.calibrate.alternate`); `from_dense` refits the down projection after it."""
    sample, size, k = source.sample, source.group_size, source.sample.num_experts_per_tok
    if k == source.num_experts:  # nothing to choose: equal logits, equal weights
        shared_S, groups_EF = random(source)
        return shared_S, groups_EF, torch.zeros(k, sample.x_TD.shape[1])
    always_on = calibrate.dominant(sample.h_TN, sample.omega_T, sample.norm_N, source.num_shared * size // 2)
    energy_TN = calibrate.energies(sample.h_TN, sample.omega_T, sample.norm_N)
    shared_S, groups_EF, gate_ED, _ = calibrate.alternate(sample.x_TD, energy_TN, num_experts=source.num_experts, k=k, size=size, rounds=ROUNDS,
                                                          generator=source.generator, always_on=always_on)
    return shared_S, groups_EF, gate_ED


def cmoe(source: LayerSource) -> tuple[Tensor, Tensor, Tensor]:
    """After CMoE (arXiv 2502.04416): shared neurons by activation rate, the others by balanced k-means of their activation markers, the gate from every
    group's representative neuron. Differs: the gate takes the neuron's gate row alone (theirs is the whole SwiGLU neuron), and weights are equal."""
    h_TN = source.sample.h_TN.abs()
    marker_TN = calibrate.top_mask(h_TN, max(1, round(MARKED * h_TN.shape[1])))
    order_N = marker_TN.mean(0).argsort(descending=True, stable=True)
    always = source.num_shared * source.group_size
    rest_M = order_N[always:].sort().values
    rows_MT = split.unit_rows(marker_TN[:, rest_M].T)
    groups_EF = split.kmeans(rows_MT, source.num_experts, generator=source.generator, restarts=1, iterations=20)
    centre_ET = torch.stack([rows_MT[group_F].mean(0) for group_F in groups_EF])
    nearest_E = torch.stack([group_F[(rows_MT[group_F] @ centre_T).argmax()] for group_F, centre_T in zip(groups_EF, centre_ET, strict=True)])
    return order_N[:always].sort().values, rest_M[groups_EF], source.gate_ND[rest_M[nearest_E]].float()


def expert_weaver(source: LayerSource) -> tuple[Tensor, Tensor, Tensor]:
    """After ExpertWeaver (arXiv 2602.15521): groups and router from the GLU's gate weights: shared neurons are those whose gate is open most often, the others
    go by balanced k-means of their gate rows, and a group's mean row is its router. Differs: one share of shared neurons for all layers."""
    open_N = ((source.sample.x_TD @ source.gate_ND.float().T) > 0).float().mean(0)
    order_N = open_N.argsort(descending=True, stable=True)
    always = source.num_shared * source.group_size
    rest_M = order_N[always:].sort().values
    rows_MD = source.gate_ND[rest_M].float()
    groups_EF = split.kmeans(rows_MD, source.num_experts, generator=source.generator, restarts=1, iterations=50)
    return order_N[:always].sort().values, rest_M[groups_EF], rows_MD[groups_EF].mean(1)


@dataclass(frozen=True, slots=True)
class Method:
    """A construction: its split, the statistics that it needs, its default number of shared experts (None: none are allowed), whether E*F + S = N must
    hold, and whether the down projection is refitted after the split. With needs="activations" the split also gives the gate, and widths are chosen by
    `dyn.models.llama_moe_calibrate.geometry` where the caller gives none."""

    split: Callable[[LayerSource], tuple[Tensor, ...]]
    needs: Need = "nothing"
    shared: int | None = 0
    partition: bool = True
    refit: bool = False


METHODS: dict[str, Method] = {
    "random": Method(random),
    "kmeans": Method(kmeans),
    "coactivation": Method(coactivation, needs="coactivations"),
    "gradient": Method(gradient, needs="scores", shared=None),
    "sharing_inner": Method(sharing_inner, needs="scores", shared=None, partition=False),
    "sharing_inter": Method(sharing_inter, needs="scores", shared=1),
    "copy": Method(copy, shared=None, partition=False),
    "calibrated": Method(calibrated, needs="activations", refit=True),
    "cmoe": Method(cmoe, needs="activations"),
    "expert_weaver": Method(expert_weaver, needs="activations"),
}


def fitted() -> list[str]:
    """Constructions whose groups and gates are fitted to activations."""
    return [name for name, method in METHODS.items() if method.needs == "activations"]


@dataclass(kw_only=True, slots=True)
class Construction:
    """The manifest of a conversion: enough to know, and to do again, which neuron went where.

    groups, shared: a LongTensor [E, F] and [S] for each layer, indices into the dense model's neurons. source_hash: SHA-256 of the dense feed-forward weights.
    """

    method: str
    seed: int
    source: str
    source_hash: str
    source_license: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    groups: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write construction.json and construction.safetensors into `folder`."""
        words = {k: v for k, v in asdict(self).items() if k not in ("groups", "shared")}
        indices = {f"layers.{i}.{kind}": t.to(torch.int32).cpu().contiguous() for kind in ("groups", "shared") for i, t in enumerate(getattr(self, kind))}
        save_file(indices, str(Path(folder) / INDEX))
        (Path(folder) / MANIFEST).write_text(json.dumps({"version": 1, "layers": len(self.groups), **words}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Construction | None:
        """Read it back; None where `folder` is not a local folder with a manifest, or, with a warning, where that is damaged: the model itself is whole."""
        path = Path(folder)
        if not (path / MANIFEST).is_file():
            return None
        try:
            words = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            words.pop("version")
            indices, layers = load_file(str(path / INDEX)), range(words.pop("layers"))
            return cls(**words, groups=[indices[f"layers.{i}.groups"].long() for i in layers], shared=[indices[f"layers.{i}.shared"].long() for i in layers])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            warnings.warn(f"{path / MANIFEST} or {INDEX} beside it is damaged ({error!r}); the model is loaded without its construction", stacklevel=2)
            return None


def generator(seed: int, *place: object) -> torch.Generator:
    """A generator of its own for every place (a layer, a use), all from one seed."""
    digest = hashlib.sha256(":".join(map(str, (seed, *place))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
