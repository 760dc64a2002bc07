"""`python -m loftq_cli`."""

from loftq_cli.cli import main

if __name__ == "__main__":  # a process that `loftq` starts imports this module again
    main()
