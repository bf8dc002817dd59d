"""Model families. Importing this package registers them with transformers' Auto classes and `experts_implementation="dyn"`."""

from dyn.models import experts_interface as experts_interface
from dyn.models import llama_moe as llama_moe
