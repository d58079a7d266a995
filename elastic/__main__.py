"""`python -m elastic ...`, the same as the `elastic` command."""

from elastic.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
