"""Data of a run that names none: the offline mixture, packed for its backbone and kept in the cache."""

import json
import os
from dataclasses import replace
from pathlib import Path

from elastic.commands.data_prep import part
from elastic.console import say
from elastic.data.shards import MANIFEST, tokenizer_hash
from elastic.files import alone, cache_folder, find_config, text_sha256
from elastic.model.loading import load_tokenizer, longest_context

MIXTURE = "mixture/offline"


def own_data(backbone: str, gguf_file: str | None = None) -> Path:
    """Folder of the packed mixture; packed first where it is not there yet, while other processes wait.

    Raises:
        FileNotFoundError, ValueError: no such backbone, or one that cannot read the mixture's rows.
    """
    mixture = replace(part("mixture_config").read_mixture(find_config(MIXTURE, "mixture")), backbone=backbone)
    if gguf_file is not None:
        raise ValueError(f"no data.data_dir is given, and {MIXTURE} is not packed for GGUF files; pack data yourself")
    if (limit := longest_context(backbone)) < mixture.seq_length:
        raise ValueError(
            f"no data.data_dir is given, and {backbone} reads {limit} tokens, but rows of {MIXTURE} have "
            f"{mixture.seq_length}; pack data with shorter ones (elastic data_prep) and name its folder"
        )
    # By its tokenizer too: a folder of the same name may hold another model than it did, or than one elsewhere.
    told = json.dumps([mixture.to_dict(), tokenizer_hash(load_tokenizer(backbone))], sort_keys=True)
    name = f"{Path(backbone).name}-{text_sha256(told)[:12]}"
    folder = cache_folder() / "data" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f"{name}.lock")):
        if not (folder / MANIFEST).is_file():
            say(f"no data.data_dir is given: packing {MIXTURE} for {backbone} in {folder}")
            part("pack_mixture").pack_mixture(mixture, folder, os.cpu_count() or 1)
    return folder
