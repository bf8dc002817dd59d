"""Register our vision models with timm when somebody imports timm: importing it costs seconds, which language models need not pay."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTimm(MetaPathFinder):
    """Finds timm where the other finders do, and imports `dyn.models.resnet` once it has run."""

    looking = False

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec("timm")
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module("dyn.models.resnet")

            spec.loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Now if timm is imported already, else as soon as it is."""
    if "timm" in sys.modules:
        importlib.import_module("dyn.models.resnet")
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
