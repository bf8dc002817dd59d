"""dyn: dense pre-trained networks made dynamic and sparse. Importing this stays light; models register in `import dyn.models`."""

__version__ = "0.1.0"
