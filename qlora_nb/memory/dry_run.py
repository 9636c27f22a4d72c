"""What a step holds besides weights and states: counted on a dry run, before anything is loaded.

A *dry run* sends one batch through one layer and through two, forward and backward, on torch's
*meta* device: every tensor has its true shape and no memory. The code that runs is the real one
(transformers' model, PEFT's adapter, checkpointing, the loss), so the count holds for any causal
language model and changes when a setting changes. The difference between two layers and one is what
each further layer keeps; what a layer needs only while it works is needed once, whatever the depth.

Two things are stood in for, because on *meta* they would not run as they do on a card: a 4-bit
layer unpacks its weight into a buffer that lives for one product
(`bitsandbytes/autograd/_functions.py`, `MatMul4Bit`), and fused attention keeps query, key, value
and output but never the square of scores (`scaled_dot_product_attention`).
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_nb.memory import live_bytes
from qlora_nb.model import chunked_loss, embeddings, load
from qlora_nb.model.linear_layers import adapted_names, linear_layers


class _Unpacked(torch.autograd.Function):
    """x Wᵀ with W unpacked into a buffer for as long as the product takes, again in the backward
    pass.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return nn.functional.linear(x, torch.empty_like(weight))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty_like(ctx.weight), None


class _Frozen4bit(bnb.nn.Linear4bit):
    """A 4-bit layer as far as memory is concerned; PEFT takes it for the real one."""

    def __init__(self, n_in: int, n_out: int, bias: bool, dtype: torch.dtype):
        super().__init__(n_in, n_out, bias, compute_dtype=dtype)
        self.weight.data = self.weight.data.to(dtype)

    def forward(self, x):
        out = _Unpacked.apply(x.to(self.compute_dtype), self.weight.data)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _attention(module, query, key, value, attention_mask, **kwargs):
    """The shape of transformers' `sdpa_attention_forward`: key and value heads are repeated where
    there is a mask.
    """
    if attention_mask is not None and key.shape[1] != query.shape[1]:
        key, value = (
            t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value)
        )
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_on_meta", _attention)

AttentionMaskInterface.register("fused_on_meta", sdpa_mask)


@dataclass(frozen=True)
class Step:
    """What decides a step's activations besides the model: `batch` rows of `length` tokens, and how
    they are computed.

    `r` 0 is a model without an adapter, `train` False a forward pass without gradients whose last
    token alone meets the head; `rest_dtype` is the dtype of what is not quantized (None: `dtype`),
    `loss_chunk` the tokens in a slice of the loss (0: all).
    """

    batch: int
    length: int
    r: int = 0
    target_modules: tuple[str, ...] = ("all-linear",)
    dtype: torch.dtype = torch.float16
    rest_dtype: torch.dtype | None = None
    lora_dropout: float = 0.0
    checkpointing: bool = True
    loss_chunk: int = 0
    head_4bit: bool = False
    train: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes besides weights, gradients and states.

    `kept` is held in every layer for the backward pass. The others live for a moment: `forward` and
    `backward` while one layer works, `loss` from the head to the loss and back. What the whole pass
    shares (rotary tables, mask, last hidden state) is in all three.
    """

    kept: int
    forward: int
    backward: int
    loss: int


def dry_run(config, step: Step) -> Activations:
    """Count the activations of one step of a model.

    Args:
        config: transformers' configuration of a causal language model.
        step: batch, length and settings.

    Example, checkable by hand: with checkpointing a layer keeps its input, so pythia-12b keeps 512
    · 5,120 · 2 bytes = 5 MiB a layer at 512 tokens in 16 bit, 180 MiB in all.
    """
    key = config.to_json_string()
    _CONFIGS[key] = config
    return _dry_run(key, step)


_CONFIGS: dict[str, object] = {}


@functools.lru_cache(maxsize=4096)
def _dry_run(key: str, step: Step) -> Activations:
    if step.loss_chunk and not _head_is_last(key):
        step = replace(step, loss_chunk=0)  # as `probes.before_training` does with the model itself
    one = _count(1, key, step)
    if step.checkpointing or not step.train:  # a layer's input, or nothing at all
        kept = (
            step.batch
            * step.length
            * _CONFIGS[key].hidden_size
            * (step.rest_dtype or step.dtype).itemsize
            * step.train
        )
    else:
        kept = _count(2, key, step)["kept"] - one["kept"]
    shared = one["kept"] - kept
    return Activations(kept, *(one[phase] + shared for phase in ("forward", "backward", "loss")))


def _count(n_layers: int, key: str, step: Step) -> dict[str, int]:
    """Bytes kept after the forward pass of so many layers, and how much more each phase needs."""
    model = _shell(
        n_layers,
        key,
        replace(
            step, batch=1, length=1, loss_chunk=0, checkpointing=step.checkpointing and step.train
        ),
    )
    base = model.get_base_model() if step.r else model
    head = base.get_output_embeddings()
    model.train(step.train).zero_grad()
    ids = torch.zeros(step.batch, step.length, dtype=torch.long, device="meta")
    with (
        live_bytes.LiveBytes(model, step.batch == 1) as count,
        torch.set_grad_enabled(step.train and step.r > 0),
    ):
        hidden = base.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )[0]
        found = {"kept": count.live, "forward": count.peak - count.live, "backward": 0}
        kept = count.peak = count.live
        if not torch.is_grad_enabled():
            head(hidden[:, -1:]).float()
            return found | {"loss": count.peak - kept}
        leaf = hidden.detach().requires_grad_()
        if step.loss_chunk:
            # at worst every token trains
            loss = chunked_loss.summed_cross_entropy(
                leaf.flatten(0, 1).clone(), ids.flatten(), head, step.loss_chunk
            )
        else:
            with _given(base, leaf):  # what the model computes after its head counts too
                loss = base(input_ids=ids, labels=ids).loss
        loss.backward()
        found["loss"] = count.peak - kept
        del loss
        count.peak = count.live
        hidden.backward(leaf.grad)
    trained = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return found | {"backward": count.peak - kept - trained}


@contextmanager
def _given(model: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Inside, the model's blocks are left out: `hidden` (rows, tokens, width) is what they give."""

    def forward(*args, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    with chunked_loss.replaced_forward(model.base_model, forward):
        yield


@functools.lru_cache(maxsize=256)
def _head_is_last(key: str) -> bool:
    """Whether the logits are what the head gives, up to a constant factor: then the loss can be
    taken in slices.

    Blocks and head are left out and large logits are given, which is all that a model without
    weights can be asked. `probes.head_is_last` asks the loaded one.
    """
    model = _shell(1, key, Step(1, 1, checkpointing=False))
    head = model.get_output_embeddings()
    logits = torch.linspace(1, 200, len(head.weight)).expand(1, 2, -1)

    def forward(hidden):
        return logits

    with (
        torch.no_grad(),
        _given(model, torch.zeros(1, 2, head.weight.shape[1])),
        chunked_loss.replaced_forward(head, forward),
    ):
        factors = model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.float() / logits
    return bool(factors.isclose(factors.mean(), rtol=1e-3).all())


@functools.lru_cache(maxsize=16)
@load.without_checkpointing_warning()
def _shell(n_layers: int, key: str, step: Step):
    """The model on *meta* with so few layers, its 4-bit layers stood in for and its adapter
    attached.
    """
    config = copy.deepcopy(_CONFIGS[key])
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    with torch.device("meta"):
        how = {
            "dtype": step.rest_dtype or step.dtype,
            "attn_implementation": "fused_on_meta",
            "trust_remote_code": False,
        }
        model = AutoModelForCausalLM.from_config(config, **how)
        for name, layer in linear_layers(model).items():
            model.set_submodule(
                name,
                _Frozen4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, step.dtype
                ),
            )
        if step.head_4bit and not embeddings.are_tied(model):
            head = model.get_output_embeddings()
            slices = [
                _Frozen4bit(head.in_features, rows, False, step.dtype)
                for rows in embeddings.slice_rows(head.out_features)
            ]
            model.set_output_embeddings(embeddings.SlicedHead(slices))
        model.is_loaded_in_4bit = True  # PEFT asks
        model.requires_grad_(False)
        if step.checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.enable_input_require_grads()
        if step.r:
            targets = adapted_names(model, step.target_modules)
            lora = LoraConfig(
                r=step.r,
                target_modules=targets,
                lora_dropout=step.lora_dropout,
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora)
    return model
