"""LLaMA-MoE in the idiom of transformers 5: configuration, experts, model, Auto registration.

One decoder for what Llama, Mistral, Qwen2 and Qwen3 dense checkpoints become: their attention biases, QK-norm and sliding windows
are fields of the configuration. T tokens, B sequences, D hidden size, E routed experts, K experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward

from dyn.models.llama_moe_config import LlamaMoeConfig
from dyn.nn.experts import GATES, Balance, Choice, Experts, Gate, MoeFeedForward, statistics_of_layers
from dyn.ops.experts import experts as experts_op


@use_experts_implementation
class LlamaMoeExperts(Experts):
    """`Experts` behind transformers' switch: "dyn" (the default here), "grouped_mm", "batched_mm" or "eager" (this forward)."""

    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__(config.num_experts, config.hidden_size, config.of_layer("moe_intermediate_size", layer_idx))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], [T, K], [T, K] -> [T, D]; the readable reference."""
        return experts_op(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights, backend="eager")


class LlamaMoeAttention(nn.Module):
    """Multi-head attention of Llama, Mistral, Qwen2 and Qwen3: biases, QK-norm and a sliding window by configuration."""

    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups, self.scaling = heads // kv_heads, self.head_dim**-0.5
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None,
                past_key_values: Cache | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] -> ([B, L, D], attention weights or None)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling,
                                 sliding_window=self.sliding_window, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class LlamaMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the mixture; hands the gate's choice up beside the hidden states, so that it survives checkpointing."""

    def __init__(self, config: LlamaMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaMoeAttention(config, layer_idx)
        gate = Gate(config.hidden_size, config.num_experts, config.of_layer("num_experts_per_tok", layer_idx), config.gate, noise=config.gate_noise,
                    noise_epsilon=config.noise_epsilon, balance=config.balance, legacy_load=config.legacy_load, capacity_factor=config.capacity_factor)
        self.mlp = MoeFeedForward(gate, LlamaMoeExperts(config, layer_idx), shared_width=config.shared_width(layer_idx),
                                  score_scale=float(config.of_layer("score_scale", layer_idx)), learnable_scale=config.learnable_scale)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, output_router_stats: bool = False, output_router_logits: bool = False,
                **kwargs) -> tuple[Tensor, ...]:
        """[B, L, D] -> (hidden [B, L, D], attention weights or None, the gate's clean logits [B * L, E] or None, the parts of its `Choice` if asked for)."""
        attended, weights = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        mixed, routed = self.mlp(self.post_attention_layernorm(hidden_states), token_mask, False)
        return hidden_states + mixed, weights, routed.logits_TE if output_router_logits else None, *(routed.choice if output_router_stats else ())


@dataclass
class LlamaMoeOutput(CausalLMOutputWithPast):
    """loss = lm_loss, plus aux_loss while training. aux_loss: weighted balance and z losses, summed over layers. Statistics, where asked for: expert_load and
    expert_importance [layers, E] (tokens, sums of scores), dropped_mass [layers] (probability of experts not chosen), balance_loss [layers], unweighted.
    router_logits, where asked for: of every layer [B * L, E], without noise and selection bias."""

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_load: Tensor | None = None
    expert_importance: Tensor | None = None
    dropped_mass: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class LlamaMoeModelOutput(BaseModelOutputWithPast):
    """Where asked for, of every layer, router_stats: the five statistics of `Routing.stats`, each stacked; router_logits: as in `LlamaMoeOutput`."""

    router_stats: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class LlamaMoePreTrainedModel(PreTrainedModel):
    """What transformers must know about the family."""

    config_class = LlamaMoeConfig
    config: LlamaMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["selection_bias"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Ours unless another is asked for."""
        return super().get_correct_experts_implementation(requested_experts or "dyn")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Gate):
            for name, weight in module.named_parameters():
                init.zeros_(weight) if name.startswith("noise") else init.normal_(weight, mean=0.0, std=std)
            if hasattr(module, "selection_bias"):
                init.zeros_(module.selection_bias)
        elif isinstance(module, MoeFeedForward) and isinstance(module.score_scale, nn.Parameter):
            init.constant_(module.score_scale, module.initial_scale)


class LlamaMoeModel(LlamaMoePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LlamaMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
                output_hidden_states: bool | None = None, output_attentions: bool | None = None, output_router_stats: bool = False,
                output_router_logits: bool | None = None, return_dict: bool | None = None, **kwargs) -> LlamaMoeModelOutput | tuple:
        """Last hidden states [B, L, D], and what else is asked for. ValueError for attention weights where the implementation of attention makes none, and for
        logits of a gate without."""
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_router_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_router_logits and GATES[self.config.gate].logits is None:
            raise ValueError(f"output_router_logits=True: a gate of kind {self.config.gate!r} has no logits")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # A 2-D mask over cache and input: its tail marks which of the tokens given now are padding.
        token_mask = attention_mask[:, -hidden.shape[1]:].bool() if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        packed = dict(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids)
        masks = attention_mask if isinstance(attention_mask, dict) else {
            kind: (create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask)(**packed) for kind in set(self.config.layer_types)}
        position_embeddings = self.rotary_emb(hidden, position_ids)
        history, attentions, router_logits, choices = [], [], [], []
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            history += [hidden] if output_hidden_states else []
            hidden, weights, logits, *choice = layer(
                hidden, token_mask=token_mask, output_router_stats=output_router_stats, output_router_logits=output_router_logits, attention_mask=masks[kind],
                position_ids=position_ids, past_key_values=past_key_values, position_embeddings=position_embeddings, **kwargs)
            attentions += [weights] if output_attentions else []
            router_logits += [logits] if output_router_logits else []
            choices += [Choice(*choice)] if output_router_stats else []
        if any(weights is None for weights in attentions):
            raise ValueError(f"output_attentions=True needs attn_implementation='eager'; {self.config._attn_implementation} makes no attention weights")
        hidden = self.norm(hidden)
        mask_T = None if token_mask is None else token_mask.flatten()
        stats = statistics_of_layers([layer.mlp.gate for layer in self.layers], choices, mask_T) if choices else None
        output = LlamaMoeModelOutput(last_hidden_state=hidden, past_key_values=past_key_values if use_cache else None, attentions=tuple(attentions) or None,
                                     hidden_states=(*history, hidden) if output_hidden_states else None, router_stats=stats,
                                     router_logits=tuple(router_logits) or None)
        return output if self._wants_dict(return_dict) else output.to_tuple()


class LlamaMoeForCausalLM(LlamaMoePreTrainedModel, GenerationMixin):
    """A LLaMA whose feed-forward networks are mixtures of experts, with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__(config)
        self.model = LlamaMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.construction: Construction | None = None  # how it was made, when it was made from a dense model
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                output_router_stats: bool | None = None, logits_to_keep: int | Tensor = 0,
                return_dict: bool | None = None, **kwargs) -> LlamaMoeOutput | tuple:
        """Next-token logits and, with `labels` [B, L] (-100 = ignored; shifted inside), the loss.

        `output_router_stats` (None: while training or with labels) fills the statistics of `LlamaMoeOutput`; `output_router_logits`, `output_hidden_states`
        and `output_attentions` what they name.
        """
        stats_wanted = self.training or labels is not None if output_router_stats is None else output_router_stats
        use_cache = (self.config.use_cache and not self.training and labels is None) if use_cache is None else use_cache
        base = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                          inputs_embeds=inputs_embeds, use_cache=use_cache, output_router_stats=stats_wanted, return_dict=True, **kwargs)
        hidden = base.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden if isinstance(keep, int) else hidden[:, keep, :])
        loss = lm_loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        stats: dict[str, Tensor] = {}
        if stats_wanted:
            balance, z, load, importance, dropped = base.router_stats
            aux_loss = self.config.balance_weight * balance.sum() + self.config.z_loss_weight * z.sum()
            stats = dict(aux_loss=aux_loss, balance_loss=balance.detach(), expert_load=load, expert_importance=importance, dropped_mass=dropped)
            if loss is not None and self.training:
                # A caller that accumulates gives the targets of the whole step, and the loss above is this part's share of its mean: so is this.
                items = kwargs.get("num_items_in_batch")
                loss = lm_loss + aux_loss * (1.0 if items is None else (labels[:, 1:] != -100).sum() / items)
        output = LlamaMoeOutput(loss=loss, logits=logits, past_key_values=base.past_key_values, hidden_states=base.hidden_states, attentions=base.attentions,
                                lm_loss=lm_loss, router_logits=base.router_logits, **stats)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def update_selection_bias(self, expert_load: Tensor) -> None:
        """One step of balance="bias" for every layer from loads [layers, E] (counts of tokens). ValueError with any other balance."""
        for layer, load_E in zip(self.model.layers, expert_load, strict=True):
            layer.mlp.gate.update_bias(load_E, self.config.bias_update_rate)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """As in transformers; beside it a model card, and the construction's manifest where the model has one."""
        hub = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "revision", "create_pr") if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            if self.construction is not None:
                self.construction.save(save_directory)
            write_card(self, save_directory)
        if push_to_hub and kwargs.get("is_main_process", True):
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As in transformers, but with our model card; see `dyn.models.llama_moe_card.push_to_hub`."""
        return push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args, **kwargs) -> LlamaMoeForCausalLM:
        """As in transformers; the construction's manifest comes along where a local folder has one."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.construction = Construction.load(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return loaded


def filled(net: PreTrainedModel, state: dict[str, Tensor], device: torch.device) -> None:
    """Give a decoder that was made on the meta device its weights, ties and rotary table; `state` may lack what was put in before."""
    if net.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    result = net.load_state_dict(state, strict=False, assign=True)
    net.tie_weights()
    net.model.rotary_emb = type(net.model.rotary_emb)(config=net.config).to(device)
    left = [name for name, tensor in (*net.named_parameters(), *net.named_buffers()) if tensor.is_meta]
    assert not left and not result.unexpected_keys, (left, result.unexpected_keys)


AutoConfig.register(LlamaMoeConfig.model_type, LlamaMoeConfig)
AutoModel.register(LlamaMoeConfig, LlamaMoeModel)
AutoModelForCausalLM.register(LlamaMoeConfig, LlamaMoeForCausalLM)

ScaleMode = Literal["n_over_k", "n", "k", "sqrt_kn", "learnable", "measured"]

# Below, since these build on the classes above.
from dyn.models.llama_moe_budget import layer_budgets as layer_budgets  # noqa: E402
from dyn.models.llama_moe_card import push_to_hub  # noqa: E402
from dyn.models.llama_moe_convert import Construction as Construction  # noqa: E402
from dyn.models.llama_moe_convert import from_dense as from_dense  # noqa: E402
from dyn.models.llama_moe_formats import from_official as from_official  # noqa: E402
from dyn.models.llama_moe_formats import to_mixtral as to_mixtral  # noqa: E402
from dyn.models.llama_moe_formats import to_qwen2_moe as to_qwen2_moe  # noqa: E402
from dyn.models.llama_moe_formats import write_card as write_card  # noqa: E402
from dyn.models.llama_moe_prune import prune_dense as prune_dense  # noqa: E402

__all__ = ["Balance", "Construction", "LlamaMoeConfig", "LlamaMoeForCausalLM", "LlamaMoeModel", "LlamaMoeOutput", "from_dense",
           "from_official", "layer_budgets", "prune_dense", "to_mixtral", "to_qwen2_moe", "write_card"]
