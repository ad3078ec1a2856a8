"""Half Fine-Tuning: fine-tune language models without making them forget."""

__version__ = "0.1.0"
