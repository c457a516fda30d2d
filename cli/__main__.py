"""`python -m compress.cli` is the `compress` script."""

from compress.cli.app import main

if __name__ == "__main__":
    main()
