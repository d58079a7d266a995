"""Routed models on vLLM (docs/vllm.md): a plugin of the group `vllm.general_plugins`, whose entry point is
`elastic.engines.vllm.plugin.register`. Everything that depends on a version of vLLM is in `engine.py`.
"""
