"""`save_pretrained` of an attached model: the backbone alone, which is all that transformers would load again."""

import warnings
from typing import Any

from elastic.protocols import CausalLM
from elastic.routing.router import Router


class SavePretrained:
    """A model's `save_pretrained`, without its routers. Callable in place of the method; copies with its model."""

    def __init__(self, model: CausalLM) -> None:
        part: Any = model
        self.model, self.inner = part, part.save_pretrained
        self.__wrapped__ = self.inner

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save, and say what was left out."""
        places = tuple(f"{name}." for name, module in self.model.named_modules() if isinstance(module, Router))
        before = self.model._keys_to_ignore_on_save
        left_out = {name for name in self.model.state_dict() if name.startswith(places)}
        self.model._keys_to_ignore_on_save = left_out | set(before or ())
        try:
            found = self.inner(*args, **options)
        finally:
            self.model._keys_to_ignore_on_save = before
        warnings.warn(
            "save_pretrained wrote the backbone without its routers; elastic.save_elastic(path, model, backbone) writes"
            " these",
            stacklevel=2,
        )
        return found


def save_backbone_alone(model: CausalLM) -> None:
    """Put `SavePretrained` before a model's own."""
    part: Any = model
    part.save_pretrained = SavePretrained(model)


def save_as_before(model: CausalLM) -> None:
    """Undo `save_backbone_alone`, whether or not it was called."""
    own = vars(model)
    if isinstance(own.get("save_pretrained"), SavePretrained):
        before = own.pop("save_pretrained").inner
        if getattr(before, "__func__", None) is not getattr(type(model), "save_pretrained", None):
            own["save_pretrained"] = before  # somebody else's, from before
