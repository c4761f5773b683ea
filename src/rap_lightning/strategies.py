"""FSDP2 with the options that one machine, many nodes and large models need, and the checks of strategies.

The checks run on parsed options (`check_requested`) or on the trainer's strategy (`check_size`, `check_resumes`),
before any process is started. Those of DeepSpeed are in distributed/deepspeed_checks.py.
"""

from __future__ import annotations

from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh

from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.sharded_folder import META, load_plain, needs_sharding_strategy, refuse_incomplete


class FSDP2(ModelParallelStrategy):
    """Shard weights, gradients, optimizer state and the reference's weights over the ranks (FSDP2).

    Lightning's ModelParallelStrategy, with its sizes computed. A checkpoint is a folder to which every rank writes its
    part; of a LoRA run it holds the adapter without the base model. It resumes on any number of ranks.

    Args:
        shard_size: ranks that hold one copy of everything together; by default all. With the devices of a node, weights
            are gathered within nodes, and only gradients are reduced between them (HSDP).
        cpu_offload: keep the shards in the host's memory, and step the optimizer there. For a model that doesn't fit on
            the GPUs; slow.
        gather: dtype in which weights are gathered and layers compute; by default bfloat16 with ``--trainer.precision
            bf16-mixed``, and the weights' own without. Gradients are reduced in float32, and the optimizer's weights
            keep their dtype.
        save_distributed_checkpoint: False writes a single file, which rank zero must have room for.
        process_group_backend: by default NCCL on GPUs and gloo on CPUs.
        timeout: how long ranks wait for each other.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        cpu_offload: bool = False,
        gather: Literal["bfloat16", "float32"] | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend, timeout=timeout,
        )  # fmt: skip
        if shard_size is not None and shard_size < 1:
            raise ConfigError(f"--trainer.strategy.shard_size must be at least 1, found {shard_size}")
        self.shard_size, self.cpu_offload, self.gather = shard_size, cpu_offload, gather
        self.sharding: Sharding | None = None

    def check_size(self) -> None:
        """Raise ConfigError where the shard size doesn't divide the number of ranks."""
        ranks = self.num_nodes * self.num_processes
        if self.shard_size is not None and ranks % self.shard_size:
            raise ConfigError(
                f"--trainer.strategy.shard_size {self.shard_size} doesn't divide the {ranks} processes "
                f"({self.num_nodes} nodes of {self.num_processes}). Use the devices of a node, or leave it out."
            )

    def setup_environment(self) -> None:
        """Start the process group and build the device mesh."""
        self.check_size()
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gradient norms are reduced over tensors on the host
        super().setup_environment()
        mesh = self.device_mesh["data_parallel"]
        if self.shard_size is not None and self.shard_size < self.world_size:
            shape = (self.world_size // self.shard_size, self.shard_size)
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.sharding = Sharding(mesh, self._gather_dtype(), self.cpu_offload)

    def setup(self, trainer: Any) -> None:
        """Refuse a kind of checkpoint that could not be resumed, then set up the model."""
        if self._has_adapter and not self._save_distributed_checkpoint:
            raise ConfigError(
                "--trainer.strategy.save_distributed_checkpoint false doesn't go with LoRA: Lightning numbers the "
                "optimizer's state by all weights, and an adapter's are only some. Leave it out."
            )
        super().setup(trainer)

    def _gather_dtype(self) -> torch.dtype | None:
        if self.gather is not None:
            return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.gather]
        return torch.bfloat16 if str(self.precision_plugin.precision) == "bf16-mixed" else None

    def model_to_device(self) -> None:
        """Move to the device what isn't sharded; with CPU offload, only the buffers."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.root_device))
            if isinstance(module, LightningModule):
                # where it computes: ``device`` follows ``to``, which would move the weights, and has no setter
                module._device = self.root_device

    # -- checkpoints: of an adapter, the adapter alone ------------------------------------------------------------

    def _state_options(self, **options: Any) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(cpu_offload=True, ignore_frozen_params=self._has_adapter, **options)

    @property
    def _has_adapter(self) -> bool:
        policy = getattr(self.lightning_module, "policy", None)
        return policy is not None and policy.has_adapter

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather or collect the weights to save, without those of an adapter's base model."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        assert self.model is not None
        options = self._state_options(full_state_dict=not self._save_distributed_checkpoint)
        return get_model_state_dict(self.model, options=options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer state in place, from a folder without running code that its pickles may hold.

        A checkpoint without an adapter's base model is complete.

        Raises:
            ConfigError: the checkpoint is the single file of a LoRA run under another strategy, or holds code.
        """
        path = Path(self.broadcast(checkpoint_path))
        plain = weights_only is not False
        if not path.is_dir():
            if self._has_adapter:
                raise ConfigError(
                    f"{path} is a single file, of a LoRA run without FSDP2's distributed checkpoints. Resume it with "
                    "the strategy that wrote it."
                )
            return super().load_checkpoint(path, plain)
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            get_optimizer_state_dict,
            set_model_state_dict,
            set_optimizer_state_dict,
        )  # fmt: skip

        assert self.model is not None
        refuse_incomplete(path)
        options = self._state_options(strict=not self._has_adapter)
        weights = get_model_state_dict(self.model, options=options)
        load_plain({"state_dict": weights}, path)
        set_model_state_dict(self.model, weights, options=options)
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            load_plain(state, path)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])
        content: dict[str, Any] = torch.load(path / META, weights_only=plain)
        return content


def writes_shards(strategy: Any) -> bool:
    """Whether every rank writes a part of each checkpoint."""
    if isinstance(strategy, ModelParallelStrategy):
        return bool(strategy._save_distributed_checkpoint)  # Lightning 2.6.6 has no public name for it
    return isinstance(strategy, DeepSpeedStrategy)


def check_requested(strategy: Any, accelerator: Any) -> None:
    """Raise ConfigError for parsed options that name a strategy that can't work, or GPUs that aren't there."""
    name = strategy if isinstance(strategy, str) else str((strategy or {}).get("class_path", ""))
    if name.rpartition(".")[2].lower() in ("fsdp", "fsdp_cpu_offload", "fsdpstrategy"):
        raise ConfigError(
            f"--trainer.strategy {name}: torch's first FSDP packs weights so that the head's can't be read outside of "
            "its own forward pass. Use --trainer.strategy fsdp2."
        )
    if isinstance(strategy, str) and strategy.lower() not in ("auto", *StrategyRegistry):
        classes = [kind.__name__ for kind in (FSDP2, ModelParallelStrategy, DDPStrategy, DeepSpeedStrategy)]
        usual = ("auto", "ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")
        near = get_close_matches(strategy.lower(), usual, 1)
        raise ConfigError(
            f"--trainer.strategy {strategy}: no such strategy.{f' Did you mean {near[0]}?' if near else ''} Usual ones "
            f"are auto, ddp and fsdp2; or name a class ({', '.join(classes)}), or use an overlay of configs/strategy."
        )
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise ConfigError(
            f"--trainer.accelerator {accelerator}: torch {torch.__version__} finds no GPU here (nvidia-smi lists them; "
            "a +cpu build of torch can't use any). To try on CPUs: --trainer.accelerator cpu, or -c "
            "configs/strategy/cpu-fsdp2.yaml for two sharded processes."
        )


def check_size(strategy: Any) -> None:
    """Raise ConfigError where a strategy's sizes don't make up the number of processes."""
    if isinstance(strategy, FSDP2):
        strategy.check_size()
    elif isinstance(strategy, ModelParallelStrategy):
        sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)  # Lightning 2.6.6: no public names
        ranks = strategy.num_nodes * strategy.num_processes
        if "auto" not in sizes and int(sizes[0]) * int(sizes[1]) != ranks:
            raise ConfigError(
                f"--trainer.strategy: data_parallel_size {sizes[0]} times tensor_parallel_size {sizes[1]} isn't the "
                f"{ranks} processes of {strategy.num_nodes} nodes with {strategy.num_processes} devices each. Set "
                f"data_parallel_size {ranks} and tensor_parallel_size 1, or use --trainer.strategy fsdp2."
            )


def check_resumes(strategy: Any, path: str | None) -> None:
    """Raise ConfigError where a strategy can't resume from a sharded checkpoint."""
    if path is not None and Path(path).is_dir() and not isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy):
        raise ConfigError(needs_sharding_strategy(Path(path)))


# so that a bare name works: --trainer.strategy fsdp2
if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2, description=(FSDP2.__doc__ or "").splitlines()[0])
