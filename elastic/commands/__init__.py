"""Subcommands of `elastic` besides training. Each module offers `main(argv) -> exit code`; `catalogue`
says what it is for.
"""
