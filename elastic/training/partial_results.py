"""What a killed measurement keeps: values by round and batch, in one file beside the result until that is written."""

from pathlib import Path

from torch import Tensor

from elastic.files import new_file

Found = dict[tuple[str, int], Tensor]  # by round and batch: a value or tensor of each of its samples, fp32 on the CPU


def partial_file(out: Path) -> Path:
    """Where a run keeps what it has measured until its result `out` is written."""
    return out.with_name(f".{out.name}.partial")


def write_partial(file: Path, key: str, found: Found) -> None:
    """Write what was measured so far, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"{of}/{index}": values.contiguous() for (of, index), values in found.items()}
    with new_file(file) as scratch:
        save_file(tensors, scratch, {"run": key})


def read_partial(file: Path, key: str) -> Found:
    """What an earlier run of the same key measured; nothing where there was none."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("run") != key:
                return {}
            names = [(name, *name.rsplit("/", 1)) for name in stored.keys()]  # noqa: SIM118 - not a dict
            return {(of, int(index)): stored.get_tensor(name) for name, of, index in names}
    except SafetensorError:
        return {}  # of another program: what counts is measured again
