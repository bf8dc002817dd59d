"""Small modules on `dyn.core` and `dyn.ops`."""
