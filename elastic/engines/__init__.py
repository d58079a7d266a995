"""Other people's serving engines that run routed models: `vllm`."""
