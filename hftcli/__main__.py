from hftcli.cli import main

main()
