"""`python -m bootcli` is the `bootcli` command."""

from bootcli.cli import main

if __name__ == "__main__":
    main()
