"""Saliency: how much the loss would change without a position. `score` scores the entries of parameters, `taylor` whole neurons.

Shapes: T tokens, N neurons of the feed-forward network (inputs of its down projection).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Loss = Callable[[nn.Module, Any], Tensor]  # loss_fn(model, batch) -> scalar
Named = Mapping[str, Tensor]  # parameters by name
_alone = ContextVar("alone", default=False)
APART = 0x5EED_0001  # added to seeds: weights are often drawn with the same small ones, and equal streams would tie a random choice to their values


def score(model: nn.Module, batches: Iterable[Any], loss_fn: Loss, method: str = "snip", params: str | Sequence[str] | None = None, *, seed: int = 0,
          flow: Callable[[nn.Module], Tensor] | None = None, weights: Named | None = None) -> dict[str, Tensor]:
    """Importance of every entry of the chosen parameters, float32; larger is kept.

    random: uniform. magnitude: |w|. snip: |w dL/dw|, gradients summed over batches before the absolute value (Lee et al., ICLR 2019; the gradient of a mask of
    ones). grasp: w (H g), H g the Hessian of the summed loss times its gradient (Wang et al., ICLR 2020). synflow: |w dR/dw| with every weight replaced by its
    absolute value, R = the network's output on ones, summed (Tanaka et al., NeurIPS 2020).

    Everything is computed in float32 (float64 stays; synflow on ones in float64, as products over a network leave float32's range), in evaluation mode, under a
    seed of its own. Weights, buffers, gradients of others, modes and the random state are as before afterwards, and the scored parameters have no gradient.
    With torch.distributed initialised, gradients are summed over processes, each with its own batches, so that all get the same scores.

    Args:
        model: any; the scored parameters are leaves of it.
        batches: what `loss_fn` takes; read once into a list. Sums of losses make batches of unequal size count by their size. random and magnitude need none.
        loss_fn: (model, batch) -> scalar.
        method: one of `METHODS`.
        params: a regular expression that finds names, or names; None: all trainable matrices and kernels (two axes or more).
        seed: of random scores and of whatever the loss draws.
        flow: synflow only: model -> R, where ones through the whole network make no sense (adapters). None: the network on ones in the shape of the first
            batch, a tensor, or of its first element.
        weights: what stands for w in |w dL/dw| and its kin, by name: the values before some were masked, so that a masked position has a score too. None: the
            parameters themselves.

    Raises:
        ValueError: an unknown method, no such parameter, no batch for a method that needs one, a loss that is no finite scalar, one that does not depend on
            any scored parameter.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed: {', '.join(METHODS)}")
    names = list(select(model, params))
    batches = listed(batches)
    if not batches and (method in ("snip", "grasp") or (method == "synflow" and flow is None)):
        raise ValueError(f"method={method!r} looks at data, and there are no batches")
    with _undisturbed(model, seed, runs=method in DATA_DRIVEN):
        named = {name: p.requires_grad_(True) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
        factor = {name: p.detach() if weights is None else weights[name].to(p.dtype) for name, p in named.items()}
        found = METHODS[method](model, named, factor, batches, loss_fn, flow)
        return {name: found[name].detach().to(torch.promote_types(found[name].dtype, torch.float32)) for name in names}


def listed(batches: Iterable[Any] | None) -> list[Any]:
    """Batches as a list. ValueError for a single one, whose rows or names would pass for batches."""
    if isinstance(batches, (Tensor, Mapping)):
        raise ValueError(f"batches is a {type(batches).__name__}; give a list of batches, [batch] for a single one")
    return [] if batches is None else list(batches)


def gradient(model: nn.Module, batches: Iterable[Any], loss_fn: Loss, params: str | Sequence[str], *, seed: int = 0) -> dict[str, Tensor]:
    """dL/dw of the chosen parameters with its sign, summed over batches and processes; everything else as in `score`.

    Of a parameter that is a mask this is what switching an entry does to the loss, to first order (PAD-Net section 4.2).
    """
    names, batches = list(select(model, params)), listed(batches)
    if not batches:
        raise ValueError("a gradient looks at data, and there are no batches")
    with _undisturbed(model, seed):
        named = {name: p.requires_grad_(True) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
        return dict(zip(named, _summed(model, named, batches, loss_fn), strict=True))


def select(model: nn.Module, params: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by a regular expression that their names hold, by names, or (None) all trainable ones of two axes or more; tied ones once, by any of
    their names.

    Raises:
        ValueError: none found, a name that the model does not have, or what is no regular expression.
    """
    named = dict(model.named_parameters())
    if isinstance(params, str):
        try:
            chosen = {name: p for name, p in named.items() if re.search(params, name)}
        except re.error as error:
            raise ValueError(f"params={params!r} is no regular expression: {error}") from None
    elif params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad and p.ndim >= 2}
    else:
        named = dict(model.named_parameters(remove_duplicate=False))
        if unknown := [name for name in params if name not in named]:
            raise ValueError(f"{type(model).__name__} has no parameter {unknown[0]!r}; it has {', '.join(list(named)[:8])}, ...")
        chosen = {name: named[name] for name in params}
    if not chosen:
        raise ValueError(f"params={params!r} finds no parameter of {type(model).__name__}; it has {', '.join(list(named)[:8])}, ...")
    return chosen


@contextmanager
def _undisturbed(model: nn.Module, seed: int, *, runs: bool = True) -> Iterator[None]:
    """Evaluation mode, float32 (where the model `runs`), no autocast, a seed of its own; all as before afterwards, gradients of what is scored gone."""
    if torch.is_inference_mode_enabled():
        raise ValueError("scores need autograd, which torch.inference_mode() turns off; ask for them outside of it")
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()} if runs else {}
    short = {t: t.data for t in (*wanted, *buffers) if runs and t.is_floating_point() and t.dtype.itemsize < 4}
    devices = sorted({t.device.index or 0 for t in (*wanted, *buffers) if t.is_cuda})
    try:
        for t in short:
            t.data = t.data.float()
        for p in wanted:
            p.requires_grad_(False)
            p.grad = None
        model.eval()
        with ExitStack() as stack:
            if short:  # batches of the network's own precision go with its weights
                widen = model.register_forward_pre_hook(lambda _, args, kwargs: tree_map(_wide, (args, kwargs)), with_kwargs=True)
                stack.callback(widen.remove)
            for kind in ("cpu", "cuda") if devices else ("cpu",):
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.enable_grad())
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch devices that are not put back
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield
    finally:
        scored = {p for p in wanted if p.requires_grad}
        for t, data in short.items():
            t.data = data
        for p, trainable in wanted.items():
            p.requires_grad_(trainable)
            p.grad = None if p in scored else gradients[p]
        for m, mode in modes.items():
            m.training = mode
        for b, value in buffers.items():
            if b not in short and not b.equal(value):
                b.copy_(value)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4 else value


def _loss(model: nn.Module, batch: Any, loss_fn: Loss) -> Tensor:
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite():
        raise ValueError(f"loss_fn must return a finite scalar tensor, got {loss if not isinstance(loss, Tensor) or loss.numel() == 1 else list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("the loss of loss_fn does not depend on any scored parameter")
    return loss.squeeze()


def _gradients(loss: Tensor, named: Named, **kwargs: bool) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, **kwargs)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)]


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, scores and masks are this process's alone, whatever others there are: one of them scores, and the others wait for what it found."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def together() -> bool:
    """Do processes score together?"""
    return dist.is_available() and dist.is_initialized() and not _alone.get()


def _over_processes(tensors: list[Tensor]) -> list[Tensor]:
    if together():
        for t in tensors:
            dist.all_reduce(t)
    return tensors


def _summed(model: nn.Module, named: Named, batches: Sequence[Any], loss_fn: Loss) -> list[Tensor]:
    """dL/dw of the losses' sum over batches and processes."""
    sums = [torch.zeros_like(p) for p in named.values()]
    for batch in batches:
        for total, g in zip(sums, _gradients(_loss(model, batch, loss_fn), named), strict=True):
            total += g
    return _over_processes(sums)


def _random(model: nn.Module, named: Named, *_: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(torch.initial_seed() + APART)  # on the CPU, so that every device gets the same
    return {name: torch.rand(p.shape, generator=generator, device="cpu").to(p.device) for name, p in named.items()}


def _magnitude(model: nn.Module, named: Named, factor: Named, *_: Any) -> dict[str, Tensor]:
    return {name: w.abs() for name, w in factor.items()}


def _snip(model: nn.Module, named: Named, factor: Named, batches: Sequence[Any], loss_fn: Loss, _: Any) -> dict[str, Tensor]:
    return {name: (w * g).abs() for (name, w), g in zip(factor.items(), _summed(model, named, batches, loss_fn), strict=True)}


def _grasp(model: nn.Module, named: Named, factor: Named, batches: Sequence[Any], loss_fn: Loss, _: Any) -> dict[str, Tensor]:
    products = [torch.zeros_like(p) for p in named.values()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have no second derivative
        fixed = _summed(model, named, batches, loss_fn)
        for batch in batches:
            gradients = _gradients(_loss(model, batch, loss_fn), named, create_graph=True)
            along = sum((g * f).sum() for g, f in zip(gradients, fixed, strict=True) if g.requires_grad)
            if isinstance(along, Tensor):
                for total, product in zip(products, _gradients(along, named), strict=True):
                    total += product
    return {name: w * product for (name, w), product in zip(factor.items(), _over_processes(products), strict=True)}


def _synflow(model: nn.Module, named: Named, factor: Named, batches: Sequence[Any], _: Any, flow: Callable[[nn.Module], Tensor] | None) -> dict[str, Tensor]:
    kept = {t: t.data for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    try:
        for t, data in kept.items():
            t.data = data.abs() if flow else data.abs().double()  # another memory: signs come back bit for bit. Products of whole networks leave float32
        gradients = _gradients((flow or (lambda m: _of_ones(m, batches[0])))(model), named)
        return {name: (w * g).abs() for (name, w), g in zip(factor.items(), gradients, strict=True)}
    finally:
        for t, data in kept.items():
            t.data = data


def _of_ones(model: nn.Module, batch: Any) -> Tensor:
    x = batch if isinstance(batch, Tensor) else next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    if not x.is_floating_point():
        raise ValueError(f"synflow sends ones through the network, whose input is {x.dtype}; give flow=... for networks over ids")
    out = model(torch.ones_like(x, dtype=torch.float64))
    return sum(t.sum() for t in tree_leaves(getattr(out, "logits", out)) if isinstance(t, Tensor))


METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {"random": _random, "magnitude": _magnitude, "snip": _snip, "grasp": _grasp, "synflow": _synflow}
DATA_DRIVEN = ("snip", "grasp", "synflow")  # whose scores can say nothing, and are refused then

KERNELS = {"plain": lambda x: x, "l1": torch.abs, "l2": torch.square}


def taylor(
    h_TN: Tensor, grad_TN: Tensor, *, kernel: Literal["plain", "l1", "l2"] = "l1", use_value: bool = True
) -> Tensor:
    """First-order estimate of what zeroing each neuron does to the loss, summed over the tokens of one batch.

    v_N = sum over tokens of kernel(h * dL/dh), the kernel applied per token ("sample" accumulation;
    llama_moe section 1.5). Padding and positions without a target have zero gradient and add nothing; count the
    others to turn sums into means.

    h_TN: [T, N] neuron outputs. grad_TN: [T, N] gradient of the loss at them. kernel: "plain" signed, "l1" absolute
    (the paper's recipe), "l2" squared. use_value=False leaves out the factor h.
    Returns [N], float64 for float64 input, else float32. Raises ValueError for other shapes or kernels.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}; allowed: {', '.join(map(repr, KERNELS))}")
    if h_TN.ndim != 2 or h_TN.shape != grad_TN.shape:
        raise ValueError(
            f"h_TN {list(h_TN.shape)} and grad_TN {list(grad_TN.shape)} must have one shape [tokens, neurons]"
        )
    # Products of bfloat16 lose the small per-token terms that the sum is made of.
    dtype = torch.float64 if torch.float64 in (h_TN.dtype, grad_TN.dtype) else torch.float32
    effect_TN = grad_TN.detach().to(dtype)
    if use_value:
        effect_TN = effect_TN * h_TN.detach().to(dtype)
    return KERNELS[kernel](effect_TN).sum(0)
