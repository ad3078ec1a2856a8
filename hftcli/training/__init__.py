"""One round of training, in one process per rank."""
