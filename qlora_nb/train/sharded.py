"""Every process keeps a share of every tensor: FSDP2, torch's `fully_shard`.

Under DDP each process holds the whole model. `fully_shard` (PyTorch FSDP, arXiv 2304.11277; torch's
`distributed/fsdp/_fully_shard`) cuts each tensor by rows among the processes. A block's tensors are
gathered when the block computes and given back behind it, and gradients arrive cut. The 4-bit codes
are cut as the bytes that they are; their scales stay whole in every process, because they are no
parameters (bitsandbytes keeps them beside the layer).

What is saved is whole: a checkpoint or an adapter of a sharded run is read by any other, and the
other way round.
"""

import warnings
from functools import partial
from pathlib import Path

import torch
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from qlora_nb import processes
from qlora_nb.errors import KitError
from qlora_nb.memory import shares
from qlora_nb.model import device
from qlora_nb.train.trainer import QLoRATrainer

TORCH = Version("2.13")
"""The first with which bytes (uint8) were sharded here; 2.8 crashed."""


def is_new_enough() -> bool:
    """Whether this torch shards bytes."""
    return Version(torch.__version__).release >= TORCH.release


def require_able(settings) -> None:
    """Refuse what this torch, these cards or these options cannot do under `fully_shard`.

    Raises:
        KitError: names torch's version, or the parameter.
    """
    if not is_new_enough():
        raise KitError(
            "this torch cannot shard 4-bit weights",
            value=torch.__version__,
            allowed=f"{TORCH} or newer",
            remedy="take it, or --shard none",
        )
    if device.compute_dtype(settings.compute_dtype) == torch.float16:
        raise KitError(
            "compute_dtype: float16's gradient scaler is not used with shards",
            remedy="take cards with bfloat16, or --shard none",
        )
    shares.require_shardable(settings)


def shard(model: torch.nn.Module) -> None:
    """Cut every tensor of a model with its adapter among the processes, in place: each block (of
    the longest list of modules) alone, then what is left (embedding, head, last norm), which stays
    gathered from forward to backward.
    """
    # the model hands out its last hidden states as they are; nothing is written into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    where = device.compute_device()
    mesh = init_device_mesh(where.type, (processes.count(),))
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    for block in max(lists, key=len):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")  # an answer between two steps gathers too
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if whole:
        raise KitError("not sharded", value=whole[0], remedy="take --shard none")


def whole(value: object) -> object:
    """A tensor put together from its shares; all processes must ask. Anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    return value.full_tensor().cpu()


class ShardedTrainer(QLoRATrainer):
    """A `QLoRATrainer` whose model is sharded when its optimizer is made: an adapter of a
    checkpoint has been read by then.
    """

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        shard(self.model)
        prepare = self.accelerator.prepare_model
        # accelerate would put DDP around the shares
        self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        return super().create_optimizer(model)

    def save_model(self, output_dir=None, _internal_call=False):
        own = self.model.named_parameters()
        state = {name: whole(parameter) for name, parameter in own if parameter.requires_grad}
        if self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state, save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir):
        states = self.optimizer.state_dict()
        for number, state in states["state"].items():
            states["state"][number] = {name: whole(value) for name, value in state.items()}
        if self.args.should_save:
            torch.save(states, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        for parameter, state in self.optimizer.state.items():
            place = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
            for name, value in state.items():
                if value.ndim:
                    state[name] = distribute_tensor(value, **place, src_data_rank=None)
