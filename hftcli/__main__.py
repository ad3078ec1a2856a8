"""`python -m hftcli`, which is `hft`."""

import sys
from pathlib import Path

import hftcli

# `-m` puts the working folder first: a file of the user's that is called as a module, csv.py, is not to be imported as it.
if sys.path[0] == str(Path.cwd()) != str(hftcli.PACKAGE.parent) and not sys.flags.safe_path:
    del sys.path[0]

from hftcli.commands.cli import main

main()
