"""Model families. Importing this package registers them with transformers' Auto classes and `experts_implementation="dyn"`."""

from dyn.models import llama_moe as llama_moe
