"""Benchmarks: answers in the files that their judges' own tools read. This package contains no benchmark's text."""

from rap_lightning.onpolicy.suites.alpaca_eval import AlpacaEval
from rap_lightning.onpolicy.suites.arena_hard import ArenaHard
from rap_lightning.onpolicy.suites.base import Suite
from rap_lightning.onpolicy.suites.lm_eval import LMEval
from rap_lightning.onpolicy.suites.mt_bench import MTBench

__all__ = ["AlpacaEval", "ArenaHard", "LMEval", "MTBench", "Suite"]
