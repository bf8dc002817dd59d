"""`experts_implementation="dyn"`: the mixture-of-experts models of transformers on our ops.

T tokens, K experts per token, S = T*K slots (a token's chosen experts, each a row), E experts, D hidden size, F expert width.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dyn.ops.experts import experts, routed_linear

# The default layout, gate_up [E, 2F, D] and down [E, D, F], in the words of `use_experts_implementation`.
LAYOUT = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True, "has_post_expert_norm": False}


def dyn_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[T, D], [T, K], [T, K] -> [T, D]: a module's experts by `dyn.ops.experts`, or by two routed linear layers around its own `_apply_gate` or activation.

    Raises:
        ValueError: a layout that the ops do not know, naming the flag of `use_experts_implementation` that differs.
    """
    for flag, value in LAYOUT.items():
        if getattr(module, flag, value) is not value:
            raise ValueError(f"experts_implementation='dyn' needs {flag}={value}; {type(module).__name__} has {flag}={getattr(module, flag)}")
    if _is_swiglu(module):
        return experts(hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights)
    # Any function between the products: every slot is a token with one expert. A slot of no expert (id >= E) gets zeros from both products.
    idx_S1, weight_S1 = top_k_index.reshape(-1, 1), top_k_weights.reshape(-1, 1)
    x_SD = hidden_states.repeat_interleave(top_k_index.shape[1], dim=0)
    act_SF = module._apply_gate(routed_linear(x_SD, module.gate_up_proj, idx_S1, weight_S1.new_ones(weight_S1.shape)))
    y_SD = routed_linear(act_SF, module.down_proj, idx_S1, weight_S1)
    return y_SD.view(*top_k_index.shape, y_SD.shape[-1]).sum(1)


def _is_swiglu(module: nn.Module) -> bool:
    """Whether the gate is transformers' own with SiLU."""
    act = getattr(module, "act_fn", None)
    silu = isinstance(act, nn.SiLU) or getattr(act, "__name__", type(act).__name__) in ("silu", "SiLUActivation")
    return silu and module._apply_gate.__name__ == "_default_apply_gate"


ALL_EXPERTS_FUNCTIONS.register("dyn", dyn_experts)
