"""The entry point that vLLM calls in each of its processes. It adds one check to the making of an engine's
configuration, and changes nothing for engines that are not asked to route.
"""

import functools
from typing import Any

from elastic.engines.vllm.options import Options
from elastic.engines.vllm.versions import check_version

_MARK = "_elastic_checks"


def register() -> None:
    """Let engines whose `additional_config` has a key `elastic` route their heads. Called twice, it does it once.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        import vllm
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise ImportError(
            f"the plugin runs inside vLLM, which cannot be imported ({error}); pip install 'elastic-attention[vllm]'"
        ) from error
    stock = EngineArgs.create_engine_config
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = Options.of(self.additional_config)
        if options is None:
            return stock(self, *args, **kwargs)
        check_version(vllm.__version__)
        from elastic.engines.vllm.engine import routed_config

        return routed_config(self, options, lambda: stock(self, *args, **kwargs))

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config
