"""Everything that the experts are compared with: one small function a peer, from a layer to a variant on the layer's own tensors.

A peer that is not installed, needs another device or refuses a shape raises, and stands in the table with its reason. None is a dependency.
Whatever depends on the weights or on the routing alone but not on who is computing (a cast of the ids) happens outside of the timed function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.layer import Layer, Variant
from benchmarks.measure import Refused

# Bytes of weights that batched_mm may copy, a set for each routed row. On a CPU that is hundreds of times slower than anything else, and the table waits.
COPIES_LIMIT = {"cpu": 10**8, "cuda": 10**9}


def need_cuda(layer: Layer) -> None:
    """Refuse any other device."""
    if layer.device != "cuda":
        raise Refused("needs CUDA")


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert, or a dense network."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# controls: the same number of operations, or of parameters, without routing -------------------------------------------


def dense(layer: Layer, width: int) -> Variant:
    """One dense network on the first `width` of the experts' neurons, with parameters of its own."""
    gate, up = (w.flatten(0, 1)[:width].detach().clone().requires_grad_() for w in layer.gate_up.chunk(2, dim=1))
    down = layer.down.detach().transpose(0, 1).flatten(1)[:, :width].clone().requires_grad_()
    return Variant(lambda: swiglu(layer.x, gate, up, down), (layer.x, gate, up, down), width, None)


# plain torch ----------------------------------------------------------------------------------------------------------


def own_parameters(layer: Layer) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Callable[[Callable[[], Tensor]], Variant]]:
    """Gate, up and down weights of each expert as parameters of their own, and what makes a variant of a function on them."""
    parts = [[*gate_up.detach().clone().chunk(2), down.detach().clone()] for gate_up, down in zip(layer.gate_up, layer.down, strict=True)]
    weights = [tuple(w.contiguous().requires_grad_() for w in part) for part in parts]
    leaves = (layer.x, layer.weight, *(w for part in weights for w in part))

    def gradients(grads: list[Tensor]) -> tuple[Tensor, ...]:
        dx, dweight, *rest = grads
        return dx, torch.stack([torch.cat([g, u]) for g, u in zip(rest[0::3], rest[1::3], strict=True)]), torch.stack(rest[2::3]), dweight

    return weights, lambda run: Variant(run, leaves, layer.case.K * layer.case.F, gradients)


def loop(layer: Layer) -> Variant:
    """A loop over experts that looks for each one's tokens, as it is written first."""
    weights, variant = own_parameters(layer)

    def run() -> Tensor:
        y = torch.zeros_like(layer.x, dtype=torch.float32)
        for e, expert in enumerate(weights):
            token, slot = (layer.idx == e).nonzero(as_tuple=True)
            y.index_add_(0, token, swiglu(layer.x[token], *expert).float() * layer.weight[token, slot, None])
        return y.to(layer.x.dtype)

    return variant(run)


def llama_moe(layer: Layer) -> Variant:
    """What the code of the LLaMA-MoE paper does: sort by expert, bring the counts to the host, split, run the experts in turn, join, weigh, add up."""
    weights, variant = own_parameters(layer)

    def run() -> Tensor:
        expert, slot = layer.idx.flatten().sort()
        token = slot // layer.case.K
        counts = torch.bincount(expert, minlength=layer.case.E).tolist()
        parts = layer.x.index_select(0, token).split(counts)
        rows = torch.cat([swiglu(part, *own) for part, own in zip(parts, weights, strict=True) if len(part)])
        rows = rows * layer.weight.flatten().index_select(0, slot)[:, None].to(rows.dtype)
        return rows.new_zeros(layer.x.shape).index_add(0, token, rows)

    return variant(run)


def grouped_mm(layer: Layer) -> Variant:
    """Separate steps around torch's grouped product: sort, gather, product, silu * up, product, weighted index_add. Nothing waits for the device."""
    ids = torch.arange(layer.case.E, device=layer.device)
    half = (lambda t: t.bfloat16()) if layer.mode == "autocast" else (lambda t: t)  # grouped_mm itself takes no part in autocast

    def run() -> Tensor:
        expert, slot = layer.idx.flatten().sort()
        ends = torch.searchsorted(expert, ids, right=True, out_int32=True)
        token = slot // layer.case.K
        gate, up = F.grouped_mm(half(layer.x).index_select(0, token), half(layer.gate_up).transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, half(layer.down).transpose(1, 2), offs=ends)
        rows = rows * layer.weight.flatten()[slot, None].to(rows.dtype)
        return rows.new_zeros(layer.x.shape).index_add(0, token, rows)

    return layer.variant(run)


# transformers ---------------------------------------------------------------------------------------------------------


def transformers_experts(implementation: str) -> Callable[[Layer], Variant]:
    """Mixtral's experts under one of transformers' implementations."""

    def adapt(layer: Layer) -> Variant:
        c = layer.case
        copies = 3 * c.T * c.K * c.F * c.D * layer.x.element_size()
        if implementation == "batched_mm" and copies > COPIES_LIMIT[layer.device]:
            raise Refused(f"would copy {copies / 1e9:.2g} GB of weights, a set for each routed row")
        config = MixtralConfig(hidden_size=c.D, intermediate_size=c.F, num_local_experts=c.E, num_experts_per_tok=c.K)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        # The layer's leaves in place of parameters, so that gradients arrive where they are compared.
        module._parameters.clear()
        module.__dict__.update(gate_up_proj=layer.gate_up, down_proj=layer.down)
        return layer.variant(lambda: module(layer.x, layer.idx, layer.weight))

    return adapt


# kernels of others ----------------------------------------------------------------------------------------------------


def liger(layer: Layer) -> Variant:
    """Liger-Kernel: fused gather, product and SwiGLU in Triton; the same weight layout as ours, int32 ids."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    need_cuda(layer)
    return layer.variant(lambda: LigerFusedMoEFunction.apply(layer.x, layer.gate_up, layer.down, layer.idx32, layer.weight))


def moe_ops(layer: Layer) -> Variant:
    """moe-ops: permute by counting sort, grouped products, weighted un-permute. Its histogram runs over E lanes, so E is a power of 2."""
    from moe_ops import grouped_gemm, permute, unpermute

    need_cuda(layer)
    c = layer.case
    if c.E & (c.E - 1):
        raise Refused("needs a power of 2 as the number of experts")

    def run() -> Tensor:
        rows, places, offsets = permute(layer.x, layer.idx32, E=c.E)
        gate, up = grouped_gemm(rows, layer.gate_up, offsets).chunk(2, dim=-1)
        return unpermute(grouped_gemm(F.silu(gate) * up, layer.down, offsets), places, layer.weight, c.T, c.K)

    return layer.variant(run)


def scattermoe(layer: Layer) -> Variant:
    """ScatterMoE (0.2 and later): two scattered products; gates in x's precision, weights [E, inputs, outputs] as views."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    need_cuda(layer)
    c = layer.case

    def run() -> Tensor:
        order = flatten_sort_count(layer.idx, c.E)
        gate, up = parallel_linear(layer.x, layer.gate_up.transpose(1, 2), c.K, *order, grouped_out=True).chunk(2, dim=-1)
        return parallel_linear(F.silu(gate) * up, layer.down.transpose(1, 2), 1, *order, gates=layer.weight.to(layer.x.dtype), grouped_in=True)

    return layer.variant(run)


def sonicmoe(layer: Layer) -> Variant:
    """SonicMoE with given routing: (token, expert, score) triples, weights as views with the expert last. The name of the flag for gate rows before up
    rows, and whether the stream is an argument, differ between its versions."""
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    need_cuda(layer)
    c = layer.case
    accepted = inspect.signature(functional.moe_general_routing_inputs).parameters
    concatenated = next((name for name in ("concat_layout", "is_concatenated_gate_up") if name in accepted), None)
    if concatenated is None:
        raise Refused("this version wants gate and up rows interleaved")
    token = torch.arange(c.T, device=layer.device, dtype=torch.int32).repeat_interleave(c.K)
    options = {"E": c.E, "activation_type": ActivationType.SWIGLU, concatenated: True}
    if "stream_id" in accepted:
        options["stream_id"] = torch.cuda.current_stream().cuda_stream
    expert = layer.idx32.flatten()

    def run() -> Tensor:
        score = layer.weight.flatten().to(layer.x.dtype)
        inference = {} if torch.is_grad_enabled() else {"is_inference_mode_enabled": True}
        w1, w2 = layer.gate_up.permute(1, 2, 0), layer.down.permute(1, 2, 0)
        y, _ = functional.moe_general_routing_inputs(layer.x, score, token, expert, w1, None, w2, None, **options, **inference)
        return y

    return layer.variant(run)


PEERS: dict[str, Callable[[Layer], Variant]] = {
    "loop over experts": loop,
    "LLaMA-MoE's own": llama_moe,
    "grouped_mm and separate kernels": grouped_mm,
    **{f"transformers {name}": transformers_experts(name) for name in ("eager", "grouped_mm", "batched_mm")},
    "Liger-Kernel": liger,
    "moe-ops": moe_ops,
    "ScatterMoE": scattermoe,
    "SonicMoE": sonicmoe,
}


# routing alone --------------------------------------------------------------------------------------------------------
# From logits [T, E] and ids [T, K] to a function that is timed.


def liger_index(logits: Tensor, idx: Tensor) -> Callable[[], object]:
    """Counting sort of given ids, with what its kernels need beside the order."""
    from liger_kernel.ops.fused_moe import compute_routing_metadata

    ids, E = idx.int(), logits.shape[1]
    return lambda: compute_routing_metadata(ids, E)


def moe_ops_choice(logits: Tensor, idx: Tensor) -> Callable[[], object]:
    """Top-k and the softmax over the chosen in one kernel."""
    from moe_ops import fused_topk_softmax

    return lambda: fused_topk_softmax(logits, idx.shape[1], fp32_routing=True)[::-1]


def scattermoe_index(logits: Tensor, idx: Tensor) -> Callable[[], object]:
    """torch.sort and bincount, compiled."""
    from scattermoe.parallel_experts import flatten_sort_count

    return lambda: flatten_sort_count(idx, logits.shape[1])


def sonicmoe_choice(logits: Tensor, idx: Tensor) -> Callable[[], object]:
    """Top-k and the softmax over the chosen in one kernel."""
    from sonicmoe.functional import TC_Softmax_Topk_Router_Function

    return lambda: TC_Softmax_Topk_Router_Function.apply(logits, logits.shape[1], idx.shape[1])[::-1]


CHOOSERS = {"moe-ops": moe_ops_choice, "SonicMoE": sonicmoe_choice}
INDEXERS = {"Liger-Kernel": liger_index, "ScatterMoE": scattermoe_index}
