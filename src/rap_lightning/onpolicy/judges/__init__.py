"""Judges that give responses their rewards."""

from rap_lightning.onpolicy.judges.function import Function
from rap_lightning.onpolicy.judges.implicit_reward import ImplicitReward
from rap_lightning.onpolicy.judges.likelihood import Likelihood
from rap_lightning.onpolicy.judges.llm import LLMJudge
from rap_lightning.onpolicy.judges.reward_model import RewardModel
from rap_lightning.preferences.judge import Judge

__all__ = ["Function", "ImplicitReward", "Judge", "LLMJudge", "Likelihood", "RewardModel"]
