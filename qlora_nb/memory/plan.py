"""A plan: everything that decides how much memory and how many operations a run takes.

The room's questions are functions of one plan, so that no two of them can disagree about a setting:
`ledger.predict` counts what is stored, `dry_run.dry_run` the activations, `budget.peak` both at the
peak of a step, `estimates.step_flops` the operations. A what-if is another plan:

    budget.peak(plan_of(settings.replace(max_length=256)))
    budget.peak(dataclasses.replace(plan, r=16))

The fields are those of `settings` under short names, and what a machine adds to them: the datatypes
and whether there is a GPU.
"""

from dataclasses import dataclass, field

import torch

from qlora_nb import machine
from qlora_nb.model import configs, device


@dataclass(frozen=True)
class Plan:
    """One run on one machine; the defaults are those of QLoRA's paper, in float16, for one token.

    Plans are equal, and one entry of a cache, if their configurations read the same.

    Attributes:
        config: transformers' configuration of a causal language model.
        train: False is a generation: a forward pass without gradients, in which the last token
            alone meets the head, and `new_tokens` more in the cache of each row.
        batch, length: rows in a pass, tokens in a row.
        accumulation: passes in an optimizer step; above 1 gradients are kept between passes.
        four_bit: False stores the linear weights in `rest_dtype` too.
        dtype: of the arithmetic. `rest_dtype`: of what is not quantized; after PEFT's
            `prepare_model_for_kbit_training` it is float32.
        autocast: products in `dtype`, norms in float32, as accelerate trains in float16 on a GPU.
        r: rank of the adapter; 0 is a model without one.
        loss_chunk: tokens in a slice of the loss; 0 is all of them at once.
        on_gpu: count what CUDA takes, and leave an embedding on the CPU out.
    """

    config: object = field(compare=False, repr=False)
    train: bool = True
    batch: int = 1
    length: int = 1
    accumulation: int = 1
    new_tokens: int = 0
    four_bit: bool = True
    double_quant: bool = True
    head_4bit: bool = False
    embedding_on_cpu: bool = False
    dtype: torch.dtype = torch.float16
    rest_dtype: torch.dtype = torch.float16
    autocast: bool = False
    r: int = 0
    target_modules: tuple[str, ...] = ("all-linear",)
    lora_dropout: float = 0.0
    optim: str = "paged_adamw_32bit"
    checkpointing: bool = True
    loss_chunk: int = 0
    on_gpu: bool = True
    config_text: str = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "config_text", self.config.to_json_string(use_diff=False))


def plan_of(settings, train: bool = True, config=None, on_gpu: bool | None = None) -> Plan:
    """The plan of a run of notebook 06 (`train`) or of answering one prompt in notebook 07.

    Args:
        settings: the resolved parameters.
        config: the model's configuration; default: looked up for `settings.model_id`.
        on_gpu: whether the run is on a GPU; default: whether this machine has one.
    """
    if config is None:
        config = configs.config_of(settings.model_id)
    if on_gpu is None:
        on_gpu = bool(machine.this_machine().gpus)
    compute_dtype = settings.compute_dtype
    if compute_dtype == "auto" and on_gpu and not device.on_gpu():
        compute_dtype = "bfloat16"  # planned for a card that is not here
    dtype = device.compute_dtype(compute_dtype)
    return Plan(
        config,
        train=train,
        batch=settings.per_device_train_batch_size if train else 1,
        length=settings.max_length,
        accumulation=settings.gradient_accumulation_steps,
        new_tokens=settings.max_new_tokens,
        double_quant=settings.double_quant,
        head_4bit=settings.head_4bit,
        embedding_on_cpu=settings.embedding_on_cpu,
        dtype=dtype,
        rest_dtype=dtype,
        autocast=train and on_gpu and dtype is torch.float16,
        r=settings.r,
        target_modules=tuple(settings.target_modules),
        lora_dropout=settings.lora_dropout,
        optim=settings.optim,
        checkpointing=settings.gradient_checkpointing,
        loss_chunk=settings.loss_chunk,
        on_gpu=on_gpu,
    )
