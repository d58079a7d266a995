"""Offline data preparation: text sources, task generators, mixtures, packed shards."""
