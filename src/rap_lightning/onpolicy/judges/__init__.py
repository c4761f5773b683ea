"""What gives responses their rewards."""

from rap_lightning.onpolicy.judges.base import Judge
from rap_lightning.onpolicy.judges.function import Function
from rap_lightning.onpolicy.judges.likelihood_judges import ImplicitReward, Likelihood
from rap_lightning.onpolicy.judges.llm import LLMJudge
from rap_lightning.onpolicy.judges.reward_model import RewardModel

__all__ = ["Function", "ImplicitReward", "Judge", "LLMJudge", "Likelihood", "RewardModel"]
