"""What turns requests into responses."""

from rap_lightning.onpolicy.engines.base import Engine
from rap_lightning.onpolicy.engines.endpoint import Endpoint
from rap_lightning.onpolicy.engines.hf import Transformers
from rap_lightning.onpolicy.engines.vllm import VLLM

__all__ = ["VLLM", "Endpoint", "Engine", "Transformers"]
