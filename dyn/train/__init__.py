"""Training with Lightning: tasks, callbacks, optimiser, trainer, checkpoints, export. The only importers of lightning."""
