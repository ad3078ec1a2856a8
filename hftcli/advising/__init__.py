"""Many rounds to one recipe: `hft advise`."""
