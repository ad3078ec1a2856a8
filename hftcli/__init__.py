"""Half Fine-Tuning: fine-tune half of a language model, freeze the other half, and see what it forgot."""

from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent
