"""`python -m toolkit` is the command `edgekit`."""

from toolkit.cli import main

if __name__ == "__main__":
    main()
