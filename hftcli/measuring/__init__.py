"""What a model knows, and how far it moved from its base."""
