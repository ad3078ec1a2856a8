"""What stands between this machine, or the hosts, and a run."""
