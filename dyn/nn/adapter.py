"""Adapters, whole: attach, switch, mix in a batch, merge, save, load, exchange with peft (SparseAdapter sections 1 and 7).

    attach(model, "houlsby", r=256)
    prune(model, batches, loss_fn, method="snip", keep=0.25)      # dyn.nn.masking
    ...                                                           # train
    save_adapter(model, "my-task")
    load_adapter(another, "my-task")
"""

from __future__ import annotations

from dyn.nn.adapter_attach import adapter_parameters as adapter_parameters
from dyn.nn.adapter_attach import adapters as adapters
from dyn.nn.adapter_attach import attach as attach
from dyn.nn.adapter_attach import detach as detach
from dyn.nn.adapter_attach import flatten_prefix as flatten_prefix
from dyn.nn.adapter_attach import fusion_penalty as fusion_penalty
from dyn.nn.adapter_attach import head_parameters as head_parameters
from dyn.nn.adapter_attach import merge as merge
from dyn.nn.adapter_attach import set_active as set_active
from dyn.nn.adapter_attach import unmerge as unmerge
from dyn.nn.adapter_build import AdapterConfig as AdapterConfig
from dyn.nn.adapter_files import load_adapter as load_adapter
from dyn.nn.adapter_files import save_adapter as save_adapter
from dyn.nn.adapter_peft import export_peft as export_peft
from dyn.nn.adapter_peft import import_peft as import_peft
