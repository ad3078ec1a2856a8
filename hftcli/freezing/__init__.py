"""Which parameters train and which are frozen: names and numbers, no tensors."""
