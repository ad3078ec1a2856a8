"""Half Fine-Tuning: fine-tune language models without making them forget."""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
