"""hft in a script of one's own: freeze a half of a model before TRL or transformers trains it, and prove it afterwards.

from hftcli import freeze_half

plan = freeze_half(model, seed=1, round=0)
SFTTrainer(model, train_dataset=rows).train()
plan.verify(model)
"""

from hftcli.library.half import Half, HalfCallback, freeze_half
from hftcli.library.quiet import QuietLora, quiet_lora

__all__ = ("Half", "HalfCallback", "QuietLora", "freeze_half", "quiet_lora")
