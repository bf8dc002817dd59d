"""Model families. Importing this package registers them: with transformers' Auto classes, as `experts_implementation="dyn"`, with timm once it is imported."""

from dyn.models import after_timm
from dyn.models import encoder as encoder
from dyn.models import experts_interface as experts_interface
from dyn.models import llama_moe as llama_moe

after_timm.register()
