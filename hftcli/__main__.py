from hftcli.commands.cli import main

main()
