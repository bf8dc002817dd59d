"""BERT, RoBERTa, ALBERT and ELECTRA whose feed-forward linears are (partial) mixtures of experts (PAD-Net section 2).

    model = AutoModelForSequenceClassification.from_pretrained(...)
    make_moe(model, num_experts=8, num_experts_per_tok=2)        # in place; then dyn.nn.surgery.make_partial, compact
    model.save_pretrained(d); AutoModelForSequenceClassification.from_pretrained(d)      # after `import dyn.models`

The model keeps its class, as the parent of one that adds the balance loss to its output. B sentences of L tokens, T = B L, E experts.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal, get_args

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, modeling_outputs
from transformers import initialization as init
from transformers.models.albert import modeling_albert
from transformers.models.albert.modeling_albert import AlbertConfig, AlbertLayer
from transformers.models.bert import modeling_bert
from transformers.models.bert.modeling_bert import BertConfig, BertLayer
from transformers.models.electra import modeling_electra
from transformers.models.electra.modeling_electra import ElectraConfig, ElectraLayer
from transformers.models.roberta.modeling_roberta import RobertaConfig, RobertaLayer
from transformers.utils import ModelOutput

from dyn.nn.bank import CompactBank, PartialBank
from dyn.nn.experts import GATES, Choice, Gate, check_gate
from dyn.nn.linear_experts import LinearExperts
from dyn.nn.probe import is_bare

Where = Literal["both", "out", "int"]  # both linears of the feed-forward, the one back to the hidden size, the one out of it

# model type: (its block, the block's feed-forward linears: out of the hidden size, back to it)
FAMILIES: dict[str, tuple[type[nn.Module], str, str]] = {
    "bert": (BertLayer, "intermediate.dense", "output.dense"), "roberta": (RobertaLayer, "intermediate.dense", "output.dense"),
    "albert": (AlbertLayer, "ffn", "ffn_output"), "electra": (ElectraLayer, "intermediate.dense", "output.dense"),
}
PREFIX = "dyn_moe_"  # of our model types
MODES = ("moe_form", "moe_scales", "moe_dynamic")  # settings that `save_pretrained` writes


@dataclass(kw_only=True, repr=False, eq=False)
class MoeSettings:
    """What a MoE encoder's configuration says beyond the dense one's.

    num_experts, num_experts_per_tok, moe_where, gate, gate_noise: see `make_moe`. balance_weight: of the sum over layers of CV^2(importance) + CV^2(load).
    moe_form, moe_scales, moe_dynamic: written by `save_pretrained` for models with modes: "masked" or "compact", `scales` of `make_partial`, and the number of
    dynamic positions of every layer of experts (None: all, without modes).
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_where: str = "both"
    gate: str = "linear"
    gate_noise: bool = True
    balance_weight: float = 0.01
    moe_form: str | None = None
    moe_scales: str | None = None
    moe_dynamic: list[int | None] | None = None


@strict
class MoeBertConfig(MoeSettings, BertConfig):
    """BertConfig with `MoeSettings`."""

    model_type = f"{PREFIX}bert"


@strict
class MoeRobertaConfig(MoeSettings, RobertaConfig):
    """RobertaConfig with `MoeSettings`."""

    model_type = f"{PREFIX}roberta"


@strict
class MoeAlbertConfig(MoeSettings, AlbertConfig):
    """AlbertConfig with `MoeSettings`."""

    model_type = f"{PREFIX}albert"


@strict
class MoeElectraConfig(MoeSettings, ElectraConfig):
    """ElectraConfig with `MoeSettings`."""

    model_type = f"{PREFIX}electra"


CONFIGS = {c.model_type: c for c in (MoeBertConfig, MoeRobertaConfig, MoeAlbertConfig, MoeElectraConfig)}


def make_moe(model: PreTrainedModel, num_experts: int = 8, num_experts_per_tok: int = 2, where: Where = "both", *, noise: float = 0.0,
             gate: str = "linear", gate_noise: bool = True, gate_std: float = 0.02, balance_weight: float = 0.01) -> PreTrainedModel:
    """Replace the feed-forward linears of every Transformer layer by mixtures of experts, in place; returns the model (section 2).

    Each of them becomes E copies of itself behind a gate of its own, which chooses k for every token; without `noise` the model computes what it did. In ALBERT
    layers that share their weights share the experts. In training, outputs have `aux_loss`, the weighted balance loss (padding does not count in it), and
    `loss`, where there are labels, includes it.

    Args:
        model: BERT, RoBERTa, ALBERT or ELECTRA of transformers with any head or none, not a decoder.
        num_experts, num_experts_per_tok: E, k.
        where: both | out (the linear back to the hidden size alone, the paper's first code) | int (the other one).
        noise: added to the copies, relative to the weights' deviation.
        gate: linear (top-k of W x) | mlp | uniform (all E, k = E) | random (k at random, a control).
        gate_noise: noisy top-k: while training, noise of a learnt size on the logits; for linear and mlp gates.
        gate_std: deviation of the gate's first weights; 0 as in the official code, where at first only noise tells tokens apart.
        balance_weight: of the balance loss; 0: none.

    Raises:
        ValueError: another architecture, a decoder, a model with experts already, k outside 1 .. E, unknown settings, a linear that has been
            replaced or that shares its parameters.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or family not in FAMILIES:
        if family in CONFIGS or (isinstance(model, nn.Module) and any(isinstance(m, LinearExperts) for m in model.modules())):
            raise ValueError(f"make_moe: {type(model).__name__} has experts already")
        raise ValueError(f"make_moe: {type(model).__name__} (model_type {family!r}) is not supported; allowed: {', '.join(FAMILIES)} models of transformers")
    if getattr(model.config, "is_decoder", False):
        raise ValueError(f"make_moe: {type(model).__name__} is a decoder (config.is_decoder=True); encoders are supported")
    if where not in get_args(Where):
        raise ValueError(f"where={where!r} is unknown; allowed: {', '.join(get_args(Where))}")
    gate_noise = gate_noise and gate in GATES and GATES[gate].noise is not None
    check_gate(num_experts, num_experts_per_tok, gate, gate_noise, "importance_load", where="make_moe")
    for name, value in {"noise": noise, "gate_std": gate_std, "balance_weight": balance_weight}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"make_moe: {name}={value} must be at least 0, and finite")
    made = moe_class(type(model))
    dense, config = model.config, copy.deepcopy(model.config)
    config.__class__ = made.config_class
    for name, field in MoeSettings.__dataclass_fields__.items():
        setattr(config, name, field.default)
    config.num_experts, config.num_experts_per_tok, config.moe_where = num_experts, num_experts_per_tok, where
    config.gate, config.gate_noise, config.balance_weight = gate, gate_noise, balance_weight
    _insert(model, config, noise=noise, gate_std=gate_std)
    for module in model.modules():
        if getattr(module, "config", None) is dense:
            module.config = config
    model.__class__ = made
    return model


def _insert(model: nn.Module, config: Any, **kwargs: float) -> None:
    """Experts in place of linears, all of them or none, with gradients wanted as before."""
    block, *paths = FAMILIES[config.model_type.removeprefix(PREFIX)]
    chosen = paths if config.moe_where == "both" else paths[1:] if config.moe_where == "out" else paths[:1]
    found = [(f"{name}.{path}", m.get_submodule(path)) for name, m in model.named_modules() if isinstance(m, block) for path in chosen]
    if wrong := [f"{name} is a {type(m).__name__}" for name, m in found if type(m) is not nn.Linear]:
        raise ValueError(f"make_moe: {wrong[0]}, where an nn.Linear was expected; replace feed-forward layers before anything else is put on them")
    if not found:
        raise ValueError(f"make_moe: {type(model).__name__} has no {block.__name__}")
    if hung := [name for name, m in found if not is_bare(m)]:
        raise ValueError(f"make_moe: {hung[0]} has an adapter, a mask, a weight norm or hooks; replace feed-forward layers before that")
    uses = Counter([id(p) for _, m in found for p in (m.weight, m.bias) if p is not None])
    uses.update(id(p) for m in {*model.modules()} - {m for _, m in found} for p in m.parameters(recurse=False))
    if tied := [name for name, m in found if uses[id(m.weight)] > 1 or uses[id(m.bias)] > 1]:
        raise ValueError(f"make_moe: {tied[0]} shares its parameters with another place, which files could not say; give each layer its own")
    made = [LinearExperts.from_linear(linear, config.num_experts, config.num_experts_per_tok, gate=config.gate, gate_noise=config.gate_noise, **kwargs)
            for _, linear in found]
    for (name, _), experts in zip(found, made, strict=True):
        model.set_submodule(name, experts)


def _modes(layers: dict[str, LinearExperts]) -> tuple[str | None, str | None, list[int | None] | None]:
    """The values of `MODES`. ValueError for layers of different kinds of modes, which a file cannot hold."""
    banks = {name: m.partial for name, m in layers.items() if m.partial is not None}
    kinds = {("compact", "prune" if bank.pruned else "none") if isinstance(bank, CompactBank) else ("masked", bank.scales) for bank in banks.values()}
    if len(kinds) > 1:
        raise ValueError(f"layers of experts with different modes ({', '.join(f'{form}, scales={scales}' for form, scales in sorted(kinds))}) cannot be saved "
                         "together; call make_partial or compact on the whole model")
    if not kinds:
        return None, None, None
    counts = [None if bank is None else bank.num_dynamic if isinstance(bank, CompactBank) else
              m.weight[0].numel() if bank.mask is None else int(bank.mask.sum()) for m in layers.values() for bank in (m.partial,)]
    return *kinds.pop(), counts


def _make_room(model: nn.Module, config: Any) -> None:
    """The modes that a saved configuration tells of, ready for its tensors (on any device)."""
    if config.moe_dynamic is None:
        return
    layers, form = moe_layers(model), config.moe_form
    if len(layers) != len(config.moe_dynamic) or form not in ("masked", "compact"):
        raise ValueError(f"the configuration has modes of {len(config.moe_dynamic)} layers of experts in the form {form!r}; the model has {len(layers)} such "
                         "layers, and forms are masked, compact")
    for (name, layer), count in zip(layers.items(), config.moe_dynamic, strict=True):
        if count is None:
            continue
        one, pruned = layer.weight.detach()[0], config.moe_scales == "prune"
        if not isinstance(count, int) or not 0 <= count <= one.numel():
            raise ValueError(f"the configuration has {count} dynamic positions in {name}; allowed: 0 .. {one.numel()}")
        if form == "masked":
            partial = layer.add_partial(config.moe_scales)
            if count < one.numel():
                partial.hold(torch.zeros_like(one, dtype=torch.bool), None if pruned else torch.zeros_like(one))
        else:
            bits = torch.zeros(-(-one.numel() // 8), dtype=torch.uint8, device=one.device)
            layer.partial = CompactBank(one.shape, bits, one.new_empty(len(layer.weight), count), one.new_empty(0 if pruned else one.numel() - count),
                                        pruned=pruned)
            layer.weight = None


def moe_layers(model: nn.Module) -> dict[str, LinearExperts]:
    """The layers of experts by name, in the model's order; shared ones once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LinearExperts)}


class MoeEncoder:
    """What the classes that `moe_class` makes have before their dense parent."""

    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _insert(self, config)
        _make_room(self, config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearExperts) and module.weight is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, Gate):
            for name, weight in module.named_parameters():
                init.zeros_(weight) if name.startswith("noise") else init.normal_(weight, mean=0.0, std=0.02)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; the file's configuration says which modes there are."""
        held = {name: getattr(self.config, name) for name in MODES}
        try:
            for name, value in zip(MODES, _modes(moe_layers(self)), strict=True):
                setattr(self.config, name, value)
            super().save_pretrained(save_directory, **kwargs)
        finally:
            for name, value in held.items():
                setattr(self.config, name, value)

    @classmethod
    def from_pretrained(cls, *args: Any, expand: bool = False, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers. `expand` builds the dense banks of a compact file at once (`dyn.nn.partial.compact`)."""
        where = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        unfit = f"{where} is no MoE encoder, or of other settings; load a dense one with its own class and call make_moe"
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # tensors of other shapes
            raise ValueError(unfit) from error
        layers = moe_layers(model)
        if any(key.startswith(f"{name}.") for keys in ("missing_keys", "unexpected_keys") for key in info[keys] for name in layers):
            raise ValueError(unfit)
        for name, layer in layers.items():
            if isinstance(bank := layer.partial, PartialBank) and bank.mask is not None:
                bank.train_factor(bank.mask, layer.trained)
            if isinstance(bank, CompactBank):
                try:
                    bank.check()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                if expand:
                    bank.make_dense()
            elif bank is not None and bank.mask is not None:
                layer.fit_form()  # transformers fills parameters without the hooks of `load_state_dict`
        return (model, info) if output_loading_info else model


def __getattr__(name: str) -> type[PreTrainedModel]:
    """MoeBertModel and others, as pickle looks for them."""
    dense = getattr(transformers, name.removeprefix("Moe"), None) if name.startswith("Moe") else None
    if not (isinstance(dense, type) and issubclass(dense, PreTrainedModel) and getattr(dense.config_class, "model_type", None) in FAMILIES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return moe_class(dense)


@functools.cache
def moe_class(dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that a dense encoder's becomes: the same with experts, its output with `aux_loss` and statistics."""
    config = next(c for c in CONFIGS.values() if issubclass(c, dense.config_class))
    order = list(inspect.signature(dense.forward).parameters)[1:]

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, output_router_stats: bool | None = None, return_dict: bool | None = None, **kwargs: Any) -> Any:
        wanted = self.training if output_router_stats is None else output_router_stats
        layers = list(moe_layers(self).values())
        for layer in layers:
            layer.record = [] if wanted else None
        try:
            out = dense.forward(self, *args, return_dict=True, **kwargs)
            if wanted:
                given = dict(zip(order, args, strict=False)) | kwargs  # heads differ in their order
                ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
                length = embeds.shape[-2] if ids is None else ids.shape[-1]
                out = _with_statistics(self, out, layers, length, given.get("attention_mask"))
        finally:
            for layer in layers:
                layer.record = None
        as_tuple = not (getattr(self.config, "return_dict", True) if return_dict is None else return_dict)
        return out.to_tuple() if as_tuple else out

    return type(f"Moe{dense.__name__}", (MoeEncoder, dense), {"config_class": config, "forward": forward, "__module__": __name__, "__doc__": (
        f"{dense.__name__} with experts, see `make_moe`. `output_router_stats` (None: while training) fills aux_loss, expert_load and expert_importance.")})


def _output_class(dense: type[ModelOutput]) -> type[ModelOutput]:
    """The same output with the balance loss, weighted and summed, and [applications of a layer of experts, E]: tokens, and sums of scores, of each expert."""
    if dense not in _outputs:
        fields = [(name, Tensor | None, None) for name in ("aux_loss", "expert_load", "expert_importance")]
        made = make_dataclass(f"Moe{dense.__name__}", fields, bases=(dense,), namespace={"__module__": __name__})
        _outputs[dense] = globals()[made.__name__] = made  # where pickle looks
    return _outputs[dense]


_outputs: dict[type[ModelOutput], type[ModelOutput]] = {}
for _name in ("BaseModelOutputWithPooling", "BaseModelOutputWithPoolingAndCrossAttentions", "MaskedLMOutput", "SequenceClassifierOutput",
              "TokenClassifierOutput", "QuestionAnsweringModelOutput", "MultipleChoiceModelOutput", "NextSentencePredictorOutput"):
    _output_class(getattr(modeling_outputs, _name))  # made now, since torch.compile cannot trace the making of a class
for _output in (modeling_bert.BertForPreTrainingOutput, modeling_albert.AlbertForPreTrainingOutput, modeling_electra.ElectraForPreTrainingOutput):
    _output_class(_output)


def _with_statistics(model: Any, out: ModelOutput, layers: list[LinearExperts], length: int, mask: Tensor | None) -> ModelOutput:
    found = [layer.gate.statistics(choice, _token_mask(mask, len(choice.idx_TK))) for layer in layers for choice in _applications(layer, length)]
    aux = model.config.balance_weight * torch.stack([routed.balance_loss for routed in found]).sum()
    values: dict[str, Any] = {**out, "aux_loss": aux, "expert_load": torch.stack([routed.load_E for routed in found]),
                              "expert_importance": torch.stack([routed.importance_E for routed in found])}
    if model.training and out.get("loss") is not None:
        values["loss"] = out["loss"] + aux
    return _output_class(type(out))(**values)


def _applications(layer: LinearExperts, length: int) -> Iterator[Choice]:
    """What the gate chose each time that the layer was applied to whole sentences: chunks of a chunked feed-forward (parts of L) are put together again."""
    parts: list[tuple[torch.Size, Choice]] = []
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.gate.parameters())
    for shape, choice in layer.record:
        if trained and choice.clean_TE is not None and not choice.clean_TE.requires_grad:
            raise ValueError("the balance loss has no gradient, as this model runs under gradient checkpointing with use_reentrant=True; use "
                             "gradient_checkpointing_enable({'use_reentrant': False})")
        parts.append((shape, choice))
        if sum(s[1] for s, _ in parts) == length:
            yield choice if len(parts) == 1 else Choice(*(
                None if column[0] is None else torch.cat([t.view(*s, -1) for t, (s, _) in zip(column, parts, strict=True)], 1).flatten(0, 1)
                for column in zip(*(c for _, c in parts), strict=True)))
            parts = []


def _token_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which tokens are no padding, [T]; None for masks that are not about single tokens."""
    return mask.reshape(-1).bool() if mask is not None and mask.numel() == tokens else None


HEADS = ("AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModelForMultipleChoice",
         "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForNextSentencePrediction")
for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config)
    _dense = _config.__mro__[2]
    for _auto in (getattr(transformers, name) for name in HEADS):
        if _dense in _auto._model_mapping:
            _auto.register(_config, moe_class(_auto._model_mapping[_dense]))
