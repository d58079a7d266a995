"""The walks of docs/architecture.md are those that the code takes: files entered by one prefill and one decode step."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from elastic.inference.generate import new_cache
from elastic.model.attach import attach
from tests.helpers.models import random_ids, small_config, tiny_model

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# What a CPU runs in the place of two launches, and leaves that any step may look something up in.
INSTEAD = {
    "kernels/route_prompt.py": ("routing/router.py", "routing/relaxation.py", "attention/row_slice.py"),
    "kernels/attention_forward.py": ("attention/torch_path.py",),
    "kernels/attention_decode.py": ("attention/torch_path.py",),
}
LEAVES = {"attention/modes.py", "cache/keyword.py", "config.py", "kernels/devices.py", "visibility.py"}
PARTS = {"model/chunking.py", "model/fusing.py", "model/fused_parts.py"}  # around attention, not on the way to it
MOST_FILES = 12


def documented(walk: str) -> list[str]:
    """The files of a walk's numbered list, in order."""
    block = PAGE.split(f"<!-- walk: {walk} -->")[1].split("\n\n")[0]
    return re.findall(r"^\d+\. \[`(.*?)`\]", block, re.M)


def entered(call: Callable[[], object]) -> set[str]:
    """Files of `elastic` in which the call enters a function."""
    package, found = f"{ROOT / 'elastic'}/", set()

    def note(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            found.add(frame.f_code.co_filename.removeprefix(package))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.fixture(scope="module")
def model():
    return attach(tiny_model(), small_config()).eval()


def on_the_cpu(walk: list[str]) -> set[str]:
    return {file for listed in walk for file in INSTEAD.get(listed, (listed,))}


@pytest.mark.parametrize("walk", ["prefill", "decode"])
def test_no_file_twice_and_few_of_them(walk):
    files = documented(walk)
    assert len(files) == len(set(files)) and 10 <= len(files) <= MOST_FILES
    assert all((ROOT / "elastic" / file).is_file() for file in files)


@torch.no_grad()
def test_a_prefill_walks_as_documented(model):
    cache = DynamicCache(config=model.config)
    found = entered(lambda: model(random_ids(1, 64), past_key_values=cache))
    assert found - LEAVES - PARTS == on_the_cpu(documented("prefill"))


@torch.no_grad()
def test_a_decode_step_walks_as_documented(model):
    cache = new_cache(model, 4)
    model(random_ids(1, 64), past_key_values=cache)
    found = entered(lambda: model(random_ids(1, 1), past_key_values=cache))
    assert found - LEAVES - PARTS == on_the_cpu(documented("decode"))
