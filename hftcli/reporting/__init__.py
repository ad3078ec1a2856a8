"""What people see: terminal, page, figures, progress."""
