"""Text: sources, token shards, weighted mixtures, filters. Imports nothing else of ours."""
