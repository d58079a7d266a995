"""Offline data preparation: text sources, task generators, mixtures, packed shards. An installed package holds this
folder as `data_prep` of its own, so imports among these files are relative."""
