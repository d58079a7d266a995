"""How many operations a piece of code has PyTorch launch: what its host time on a GPU goes by."""

from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Inside the context, counts the operations, views aside.

    Attributes:
        launched: how many.
        read: how many tensors were read by the host.
    """

    def __init__(self):
        super().__init__()
        self.launched = self.read = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.launched += name not in _VIEWS
        self.read += name == "_local_scalar_dense"
        return function(*args, **(kwargs or {}))
