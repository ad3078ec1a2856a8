"""Learning against forgetting: matrices, runs as points, methods at equal learning."""
