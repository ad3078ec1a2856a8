"""From a prepared round to its ranks: one process, DeepSpeed's launcher, hosts, Slurm; signals; the fit to a device."""
