"""`python -m haste COMMAND ...` is `haste COMMAND ...`, for launchers that take a module."""

from haste.cli.main import main

if __name__ == "__main__":
    main()
