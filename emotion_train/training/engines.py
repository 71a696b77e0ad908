"""The engines, by which the processes of a run share one model: each process holds all of it
(alone, DDP), or optimizer or weights are sharded (ZeRO-2, ZeRO-3, FSDP2).

`accelerate launch` starts the processes, and its environment names the engine. The wrapping is done
here, by PyTorch's and DeepSpeed's own calls, so that the same lines run on GPUs with NCCL and on
CPUs with gloo, where accelerate would quietly take DDP instead. Accumulation, clipping and learning
rate come from the run config alone. The price: other settings of accelerate's files for DeepSpeed
and FSDP (offloading, a DeepSpeed config of its own) are refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from emotion_train.config import TrainSection
from emotion_train.errors import WrongRequest
from emotion_train.model.head import EmotionClassifier
from emotion_train.model.lora import adapter_parameters, copy_state, refuse_misfits
from emotion_train.runs.checkpoint import MOMENTS

if TYPE_CHECKING:
    from accelerate import Accelerator

Kind = Literal["one process", "DDP", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3", "FSDP2"]
NO_GPU = "-1,-1"  # CUDA_VISIBLE_DEVICES under accelerate_configs/cpu.yaml
# NCCL, which ends the process by force, waits so much longer than gloo, which can say what happened
_LATER_S = 60
# PyTorch 2.13 renamed the argument and warns of the old name
_NEW_NAME = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
_TRUE = ("true", "1", "yes")


# --- start-up ---


def start_accelerator(
    timeout_s: float, environment: Mapping[str, str] = os.environ
) -> tuple[Accelerator, Kind]:
    """Accelerate's process group and device, and the engine that was asked for.

    Raises `WrongRequest` when CUDA sees no GPU and the CPU was not asked for, when accelerate
    started fewer processes than asked for, and for settings that would have no effect.
    """
    on_cpu = _flag(environment, "ACCELERATE_USE_CPU") or environment.get("CUDA_VISIBLE_DEVICES") == NO_GPU
    if not on_cpu and not torch.cuda.is_available():
        raise WrongRequest(
            "CUDA sees no GPU here (nvidia-smi shows the driver, `python -c 'import torch;"
            " print(torch.version.cuda)'` the build); to train on the CPU type accelerate launch"
            " --config_file accelerate_configs/cpu.yaml --num_processes 1."
        )
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise WrongRequest(
            "accelerate started one process where several were asked for: with distributed_type NO or"
            " MULTI_CPU it never starts more; give --config_file accelerate_configs/cpu.yaml or one of"
            " multi_gpu_*.yaml, or --num_processes 1 (and unset MASTER_ADDR)."
        )
    kind = asked_for(environment)
    # accelerate gives the group and the device, and wraps nothing
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=on_cpu,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s + (0 if on_cpu else _LATER_S)))
        ],
    )
    started, wanted = accelerator.num_processes, int(environment.get("WORLD_SIZE", "1"))
    if started != wanted or (accelerator.device.type == "cpu") != on_cpu:
        raise WrongRequest(
            f"{wanted} processes were asked for and accelerate made {started} on {accelerator.device}; report"
            " this, please."
        )
    return accelerator, kind


def asked_for(environment: Mapping[str, str]) -> Kind:
    """The engine in the environment of `accelerate launch`. Raises `WrongRequest` for settings that
    have no effect here.
    """
    if _flag(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed_asked_for(environment)
    if _flag(environment, "ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2" or _flag(environment, "FSDP_OFFLOAD_PARAMS"):
            raise WrongRequest(
                "The accelerate config asks for FSDP 1 or for offloading; supported are the settings of"
                " accelerate_configs/multi_gpu_fsdp2_qlora.yaml (fsdp_version: 2)."
            )
        return "FSDP2"
    return "DDP" if int(environment.get("WORLD_SIZE", "1")) > 1 else "one process"


def _deepspeed_asked_for(environment: Mapping[str, str]) -> Kind:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    offloads = {
        environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
        for what in ("OPTIMIZER", "PARAM")
    }
    if (
        stage not in ("2", "3")
        or offloads - {"none"}
        or environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none"
    ):
        raise WrongRequest(
            f"The accelerate config asks for DeepSpeed with zero_stage {stage}, offloading to"
            f" {', '.join(sorted(offloads))}, or with a config file of its own; supported are zero_stage 2"
            " and 3 as in accelerate_configs/multi_gpu_deepspeed_zero*.yaml."
        )
    if find_spec("deepspeed") is None:
        raise WrongRequest(
            "The accelerate config asks for DeepSpeed, which is not installed; type pip install"
            " 'emotion-train[deepspeed]'."
        )
    return "DeepSpeed ZeRO-2" if stage == "2" else "DeepSpeed ZeRO-3"


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in _TRUE


def shards_weights(kind: Kind) -> bool:
    """Whether each process holds only its part of the base."""
    return kind in ("FSDP2", "DeepSpeed ZeRO-3")


def make_engine(kind: Kind, model: EmotionClassifier, settings: TrainSection, device: torch.device) -> Engine:
    """The model under its engine. All ranks call this function with the same model, once the
    process group exists.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    match kind:
        case "one process":
            assert world_size == 1, f"{world_size} processes would train one model each"
            return Engine(model, settings, device)
        case "DDP":
            return DataParallel(model, settings, device)
        case "FSDP2":
            # the fused decoder shards the base itself, and the trained weights are small
            gathered = model.decoder is not None and model.decoder.is_gathered
            return (DataParallel if gathered else FullySharded)(model, settings, device)
        case _:
            return Zero(model, settings, device, stage=3 if kind == "DeepSpeed ZeRO-3" else 2)


# --- the engines ---


@dataclass
class _Trained:
    """The trained parameters by their two names: the model's own, under which the optimizer's
    moments are saved, and the name in a PEFT file or a whole checkpoint.
    """

    own: dict[torch.nn.Parameter, str]
    peft: dict[str, torch.nn.Parameter]
    is_whole: bool  # there is no adapter: all of the base is trained

    @classmethod
    def of(cls, model: EmotionClassifier) -> _Trained:
        own = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return cls(own, adapter_parameters(model.network), not hasattr(model.network, "peft_config"))


class Engine:
    """One process that holds everything; the other engines derive from it.

    `module` computes the forward pass. Each step has `microbatch` around each forward and backward
    pass, then `update` once. Whole tensors are saved and loaded, the same from every engine, so
    that a run may change its engine. Every method that is not a property is called on all ranks
    together.
    """

    gradient_scale = 1.0  # by which the losses of a step are multiplied so that the ranks' gradients add up

    def __init__(self, model: EmotionClassifier, settings: TrainSection, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.module: torch.nn.Module = model
        self.trained = _Trained.of(model)
        self.optimizer = self._adamw()

    def _adamw(self) -> torch.optim.AdamW:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        groups: list[dict[str, Any]] = [{"params": list(self.trained.own)}]
        if self.trained.is_whole:  # biases and norms of a whole encoder do not decay, as is usual
            groups = [
                {"params": [one for one in self.trained.own if one.ndim >= 2]},
                {"params": [one for one in self.trained.own if one.ndim < 2], "weight_decay": 0.0},
            ]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=self.device.type == "cuda")

    @contextlib.contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Context of one forward and backward pass; in the `last` one of a step the ranks'
        gradients are added up.
        """
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float) -> None:
        """Clip the step's gradients, update the parameters at this learning rate, and clear the
        gradients.
        """
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.trained.own), self.settings.max_grad_norm)
        self._set_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def adapter(self) -> dict[str, torch.Tensor]:
        """Adapter and head, whole, under the names of a PEFT file; not copied where this process
        holds them whole.
        """
        return {name: parameter.detach() for name, parameter in self.trained.peft.items()}

    @contextlib.contextmanager
    def pieces(self, modified: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Within the block this rank's part of adapter and head, under the names of a PEFT file, or
        all of them where they are not sharded. With `modified` the tensors may be changed, on all
        ranks alike; only forward passes see the change.
        """
        yield {name: parameter.detach() for name, parameter in self.trained.peft.items()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put a whole state into the model. Raises `WrongRequest` unless names and shapes are
        exactly the model's.
        """
        copy_state(self.trained.peft, state)

    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's moments, whole, as `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`; none
        before the first update.
        """
        return optimizer_tensors(self.optimizer, self.trained.own)

    def load_moments(self, moments: Mapping[str, torch.Tensor], step: int) -> None:
        """Put whole moments back, as they were after `step` updates."""
        load_optimizer_state(self.optimizer, self.trained.own, moments, step)


class DataParallel(Engine):
    """Each process holds everything and sees its share of the posts; the gradients of adapter and
    head are averaged once a step.
    """

    def __init__(self, model: EmotionClassifier, settings: TrainSection, device: torch.device) -> None:
        super().__init__(model, settings, device)
        # Nothing is sent at the start: each rank has read the same files and drawn the same adapter
        # from the seed. Buffers are constants.
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            init_sync=False,
            gradient_as_bucket_view=True,
            **_NO_BUFFERS,
        )
        self.module = self._ddp
        self.gradient_scale = float(dist.get_world_size())

    @contextlib.contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield


class FullySharded(Engine):
    """Weights, gradients and moments are sharded, one piece a process; each block is put together
    for as long as it computes.

    The base may have any precision: 4-bit codes are moved as bfloat16 numbers, which nothing
    interprets.
    """

    def __init__(self, model: EmotionClassifier, settings: TrainSection, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in self._parts:  # sums, not means: gloo knows no mean
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
        super().__init__(model, settings, device)

    @contextlib.contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        self._parts[0].set_requires_gradient_sync(last)
        yield

    def adapter(self) -> dict[str, torch.Tensor]:
        return {name: _whole(parameter) for name, parameter in self.trained.peft.items()}

    @contextlib.contextmanager
    def pieces(self, modified: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        self._reshard()
        yield {name: _own_part(parameter) for name, parameter in self.trained.peft.items()}

    def _reshard(self) -> None:
        """Shard all parameters again: a forward pass without a backward one leaves some whole."""
        for part in self._parts:
            part.reshard()

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        refuse_misfits({name: tuple(parameter.shape) for name, parameter in self.trained.peft.items()}, state)
        self._reshard()
        with torch.no_grad():
            for name, parameter in self.trained.peft.items():
                parameter.copy_(_cut_like(parameter, state[name]))

    def moments(self) -> dict[str, torch.Tensor]:
        return {name: _whole(tensor) for name, tensor in super().moments().items()}

    def load_moments(self, moments: Mapping[str, torch.Tensor], step: int) -> None:
        pieces = {
            f"{key}.{name}": _cut_like(parameter, moments[f"{key}.{name}"])
            for parameter, name in self.trained.own.items()
            for key in MOMENTS
        }
        super().load_moments(pieces, step)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor), "a tensor of a parameter that is trained was not sharded"
    whole: torch.Tensor = tensor.full_tensor().detach()
    return whole


def _own_part(parameter: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    value: Any = parameter.detach()
    assert isinstance(value, DTensor), "a parameter that is trained was not sharded"
    part: torch.Tensor = value.to_local()
    return part


def _cut_like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's shard; every rank has the whole tensor, so nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor), "a parameter that is trained was not sharded"
    value = whole.to(parameter.device, torch.float32)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Zero(Engine):
    """DeepSpeed: gradients and moments are sharded (stage 2), and the weights too (stage 3)."""

    def __init__(
        self, model: EmotionClassifier, settings: TrainSection, device: torch.device, stage: Literal[2, 3]
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, and says so
        import deepspeed

        # DeepSpeed uses the old names of functions that PyTorch 2.13 renamed
        warnings.filterwarnings(
            "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
        )

        self._deepspeed = deepspeed
        self._stage = stage
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        config = deepspeed_config(
            stage,
            settings,
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        )
        if stage == 3:
            deepspeed.zero.Init(
                module=model, config_dict_or_path={**config, "train_batch_size": dist.get_world_size()}
            )
        super().__init__(model, settings, device)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        assert self._engine.zero_optimization_stage() == stage
        assert self._engine.dp_world_size == dist.get_world_size(), (
            "DeepSpeed sees another number of processes"
        )
        self.module = self._engine
        self.gradient_scale = float(dist.get_world_size())

    @contextlib.contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def update(self, rate: float) -> None:
        self._set_rate(rate)
        self._engine.step()  # clips and forgets the gradients too

    def adapter(self) -> dict[str, torch.Tensor]:
        with self._gathered():
            return {name: parameter.detach().clone() for name, parameter in self.trained.peft.items()}

    @contextlib.contextmanager
    def pieces(self, modified: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        with self._gathered(modified):
            yield {name: parameter.detach() for name, parameter in self.trained.peft.items()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        shapes = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.trained.peft.items()
        }
        refuse_misfits(shapes, state)
        with self._gathered(modified=True), torch.no_grad():
            for name, parameter in self.trained.peft.items():
                parameter.copy_(state[name])
        for name, parameter in self.trained.peft.items():
            self._put(parameter, state[name], None)  # DeepSpeed's own copy, from which the next update starts

    def _gathered(self, modified: bool = False) -> contextlib.AbstractContextManager[None]:
        """Context in which the trained parameters are whole; with `modified` all ranks get rank 0's
        changes.
        """
        if self._stage == 2:
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            list(self.trained.own), modifier_rank=0 if modified else None
        )
        return gathered

    def moments(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not any("exp_avg" in state for state in self.optimizer.state.values()):
            return {}
        return {
            f"{key}.{name}": safe_get_full_optimizer_state(parameter, key)
            for parameter, name in self.trained.own.items()
            for key in MOMENTS
        }

    def load_moments(self, moments: Mapping[str, torch.Tensor], step: int) -> None:
        zero: Any = self._engine.optimizer
        pieces = (
            zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat
        )
        for piece in pieces:  # AdamW would make its state in the first update
            self.optimizer.state[piece] = {
                "step": torch.tensor(
                    float(step), device=piece.device if self.optimizer.defaults["fused"] else "cpu"
                ),
                **{key: torch.zeros_like(piece) for key in MOMENTS},
            }
        if self._stage == 2:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, name in self.trained.own.items():
            for key in MOMENTS:
                self._put(parameter, moments[f"{key}.{name}"], key)

    def _put(self, parameter: torch.nn.Parameter, whole: torch.Tensor, key: str | None) -> None:
        """This rank's piece of a parameter (key None) or of a moment, from the whole one that every
        rank has.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = whole.to(self.device, torch.float32)
        # cut here: DeepSpeed 0.19.8 fails where the size is no multiple of the number of processes
        if self._stage == 3:
            count = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.nn.functional.pad(
                value.flatten(), (0, count * dist.get_world_size() - value.numel())
            )
            value = padded[dist.get_rank() * count :][:count]
        if key is None:
            (safe_set_local_fp32_param if self._stage == 3 else safe_set_full_fp32_param)(parameter, value)
        else:
            (safe_set_local_optimizer_state if self._stage == 3 else safe_set_full_optimizer_state)(
                parameter, value, key
            )


def deepspeed_config(stage: int, settings: TrainSection, trained: int) -> dict[str, Any]:
    """DeepSpeed's whole config. `Zero.microbatch` ends a step, so DeepSpeed counts one micro-batch
    a step.

    Its buckets hold the `trained` numbers; DeepSpeed's default is 500 million, 2 GB of each GPU.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": trained,
            "allgather_bucket_size": trained,
            # its own linear function for stage 3 saves nothing under frozen weights
            **({"memory_efficient_linear": False} if stage == 3 else {}),
        },
    }


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """AdamW's moments by parameter name, not copied; none for a parameter that never had a
    gradient.
    """
    return {
        f"{key}.{name}": optimizer.state[parameter][key].detach()
        for parameter, name in names.items()
        for key in MOMENTS
        if key in optimizer.state[parameter]
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.nn.Parameter, str],
    moments: Mapping[str, torch.Tensor],
    step: int,
) -> None:
    """Put the moments back; every parameter must find its own."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device if group.get("fused") else "cpu"),
                **{
                    key: moments[f"{key}.{name}"].to(parameter.device, torch.float32).clone()
                    for key in MOMENTS
                },
            }
