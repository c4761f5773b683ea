"""Engines that generate responses."""

from rap_lightning.onpolicy.engines.base import Completion, Engine, Request
from rap_lightning.onpolicy.engines.endpoint import Endpoint
from rap_lightning.onpolicy.engines.hf import Transformers
from rap_lightning.onpolicy.engines.vllm import VLLM

__all__ = ["VLLM", "Completion", "Endpoint", "Engine", "Request", "Transformers"]
