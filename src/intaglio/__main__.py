"""`python -m intaglio`: the same as the command `intaglio`."""

from intaglio.cli.app import main

if __name__ == "__main__":
    main()
