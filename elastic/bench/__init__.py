"""Timings of the kernels beside what one would run instead: `elastic bench`.

A benchmark is a module with `SUMMARY`, `add_arguments(parser)` and `run(args, command) -> exit code`; it uses the
shared cases, timing, contestants, records, tables and pictures of this package.
"""
