"""`python -m hftcli`, which is `hft`."""

from hftcli.commands.cli import main

main()
