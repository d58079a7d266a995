"""Subcommands of `elastic` besides training. Each module offers `SUMMARY` and `main(argv) -> exit code`."""
