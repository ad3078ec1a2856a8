"""A run on disk: its paths, what its files hold, how they are written."""
