"""What every judge is, by the name that judges have known it by."""

from rap_lightning.preferences.judge import Item, Judge, Verdict, declared

__all__ = ["Item", "Judge", "Verdict", "declared"]
