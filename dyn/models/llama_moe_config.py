"""Configuration of `LlamaMoeForCausalLM`. E routed experts, K experts per token, F expert width.

Annotations are evaluated here: `strict` compares fields with types, and takes a type that is still a text for none.
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from dyn.nn.experts import check_gate

PER_LAYER = ("num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "score_scale")  # a value, or a list of one a layer
SHARED_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
                 "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")  # by all formats


@strict
class LlamaMoeConfig(LlamaConfig):
    """Configuration of `LlamaMoeForCausalLM`. Beyond LlamaConfig:

    num_experts: routed experts E. num_experts_per_tok: K. moe_intermediate_size: F. num_shared_experts: always-on experts of width F, added with
    weight 1. score_scale: c, multiplies the routed sum. These last four: one value, or a list of one a layer.
    gate, gate_noise, noise_epsilon, balance, legacy_load, capacity_factor: see `dyn.nn.experts.Gate`. balance_weight, z_loss_weight: weights of the two
    losses, summed over layers (0.01 and 0 in the paper). bias_update_rate: step of balance="bias". learnable_scale: c becomes a parameter of each layer.
    attention_output_bias: bias of o_proj (attention_bias is that of q, k, v). qk_norm: RMSNorm of queries and keys (Qwen3).
    output_router_logits: whether outputs hold the gates' logits where a call does not say.
    sliding_window and layer_types: as in Mistral and Qwen. intermediate_size: width of the dense model that it came from.
    """

    model_type = "dyn_llama_moe"
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "aux_loss", "balance_loss", "expert_load", "expert_importance", "dropped_mass",
                                   "router_logits"]
    base_model_tp_plan = None

    num_experts: int = 16
    num_experts_per_tok: int | list[int] = 4
    moe_intermediate_size: int | list[int] = 688
    num_shared_experts: int | list[int] = 0
    score_scale: float | int | list[float | int] = 4.0
    learnable_scale: bool = False
    gate: str = "mlp"
    gate_noise: bool = True
    noise_epsilon: float | int = 0.01
    balance: str = "importance_load"
    balance_weight: float | int = 0.01
    z_loss_weight: float | int = 0.0
    bias_update_rate: float | int = 1e-3
    legacy_load: bool = False
    capacity_factor: float | int | None = None
    attention_output_bias: bool = False
    qk_norm: bool = False
    output_router_logits: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.layer_types is None:
            self.layer_types = ["full_attention" if self.sliding_window is None else "sliding_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_moe(self) -> None:
        """Part of `strict`'s validation: every layer's gate and widths, with the layer in the message."""
        for name in PER_LAYER:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(value)} entries; one value or one for each of the {self.num_hidden_layers} layers is allowed")
        for layer in range(self.num_hidden_layers):
            check_gate(self.num_experts, self.of_layer("num_experts_per_tok", layer), self.gate, self.gate_noise, self.balance, self.capacity_factor,
                       f"layer {layer}")
            if self.of_layer("moe_intermediate_size", layer) < 1 or self.of_layer("num_shared_experts", layer) < 0:
                raise ValueError(f"layer {layer}: moe_intermediate_size must be at least 1 and num_shared_experts at least 0, got "
                                 f"{self.of_layer('moe_intermediate_size', layer)} and {self.of_layer('num_shared_experts', layer)}")
        for name in ("noise_epsilon", "balance_weight", "z_loss_weight", "bias_update_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")
        if self.mlp_bias:
            raise ValueError("mlp_bias=True: experts have no biases")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r}: the experts are SwiGLU, so only 'silu' is allowed")

    def of_layer(self, name: str, layer: int) -> Any:
        """The value of a per-layer field (one of PER_LAYER) in one layer."""
        value = getattr(self, name)
        return value[layer] if isinstance(value, list) else value

    def shared_width(self, layer: int) -> int:
        """Width of a layer's always-on experts together."""
        return self.of_layer("num_shared_experts", layer) * self.of_layer("moe_intermediate_size", layer)

    def active_width(self, layer: int) -> int:
        """Neurons that a token passes through in a layer: of its chosen experts and of the shared ones."""
        return self.of_layer("num_experts_per_tok", layer) * self.of_layer("moe_intermediate_size", layer) + self.shared_width(layer)
