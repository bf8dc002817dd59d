"""Text, sentences and images: sources, token shards, weighted mixtures, filters, labelled sets, loaders. Imports nothing else of ours."""
