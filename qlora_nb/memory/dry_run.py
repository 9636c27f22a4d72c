"""Activations, counted on a dry run before anything is loaded.

A *dry run* sends one batch through one layer and through two, forward and backward, on torch's
*meta* device: every tensor has its true shape and no memory. The code that runs is the real one
(transformers' model, PEFT's adapter, checkpointing, the loss), so the count holds for any causal
language model and changes when a setting changes. The difference between two layers and one is what
each further layer keeps; what a layer needs only while it works is needed once, whatever the depth.

Three things are replaced, because on *meta* they would not run as they do on a card: a 4-bit layer
unpacks its weight into a buffer that lives for one product (`bitsandbytes/autograd/_functions.py`,
`MatMul4Bit`), fused attention keeps query, key, value and output but never the square of scores
(`scaled_dot_product_attention`), and the products of fused experts take transformers' operation for
every datatype (`integrations/moe.py`). Families that know no other attention than their own are
counted with it, scores and all.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import moe
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_nb.errors import KitError
from qlora_nb.memory.live_bytes import LiveBytes
from qlora_nb.memory.plan import Plan
from qlora_nb.model import chunked_loss, configs, embeddings, load
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
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(x.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(module, query, key, value, attention_mask, **kwargs):
    """The shape of transformers' `sdpa_attention_forward`: key and value heads are repeated where
    there is a mask.
    """
    repeats = query.shape[1] // key.shape[1]
    if attention_mask is not None and repeats > 1:
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """What torch's autocast does to linear layers, layer norms and attention, done on *meta*, where
    its own does nothing: products in `dtype`, norms in float32 (`aten/src/ATen/autocast_mode.h`).
    What is added to the stream between the layers then is float32 too.
    """
    linear, layer_norm, attention = nn.functional.linear, nn.functional.layer_norm, _Attention.apply

    def cast(tensors, dtype):
        return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]

    def cast_linear(x, weight, bias=None):
        return linear(*cast((x, weight, bias), dtype))

    def cast_norm(x, shape, weight=None, bias=None, eps=1e-5):
        x, weight, bias = cast((x, weight, bias), torch.float32)
        return layer_norm(x, shape, weight, bias, eps)

    def cast_attention(*query_key_value):
        return attention(*cast(query_key_value, dtype))

    with (
        patch.object(nn.functional, "linear", cast_linear),
        patch.object(nn.functional, "layer_norm", cast_norm),
        patch.object(_Attention, "apply", cast_attention),
    ):
        yield


def _fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    """A GPU's dropout remembers a byte an element; a CPU's, and that of *meta*, a whole number."""
    if p and training:
        x, _ = torch.native_dropout(x, p, training)
    return x


@contextmanager
def as_on_its_device(plan: Plan) -> Iterator[None]:
    """Inside, what runs on *meta* keeps what it would keep on the plan's device."""
    with ExitStack() as stack:
        if plan.on_gpu:
            stack.enter_context(patch.object(nn.functional, "dropout", _fused_dropout))
        if plan.autocast:
            stack.enter_context(_autocast(plan.dtype))
        yield


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


def dry_run(plan: Plan) -> Activations:
    """Count the activations of one pass.

    Example, checkable by hand: with checkpointing a layer keeps its input, so pythia-12b keeps 512
    · 5,120 · 2 bytes = 5 MiB a layer at 512 tokens in 16 bit, 180 MiB in all.
    """
    # settings that change no activation get one value, so that they share a cache entry
    return _dry_run(
        replace(
            plan,
            accumulation=1,
            new_tokens=0,
            four_bit=True,
            double_quant=True,
            embedding_on_cpu=False,
            optim="",
        )
    )


@functools.lru_cache(maxsize=4096)
def _dry_run(plan: Plan) -> Activations:
    if plan.loss_chunk and not head_is_last(plan.config):
        plan = replace(plan, loss_chunk=0)  # as `QLoRATrainer` does
    one = _count(1, plan)
    if not plan.train:
        kept = 0
    elif plan.checkpointing:
        stream = plan.rest_dtype
        if plan.autocast and _has_layer_norm(plan):
            stream = torch.float32
        kept = plan.batch * plan.length * plan.config.hidden_size * stream.itemsize
    else:
        kept = _count(2, plan).kept - one.kept
    shared = one.kept - kept
    return Activations(
        kept=kept,
        forward=one.forward + shared,
        backward=one.backward + shared,
        loss=one.loss + shared,
    )


def _has_layer_norm(plan: Plan) -> bool:
    """Whether it has torch's norm, which autocast knows; families with RMSNorm write it out
    themselves, and give what they take.
    """
    modules = _model_on_meta(1, Plan(plan.config)).modules()
    return any(isinstance(module, nn.LayerNorm) for module in modules)


def _count(n_layers: int, plan: Plan) -> Activations:
    """Bytes kept after the forward pass of so many layers, and how much more each phase needs."""
    model = _model_on_meta(n_layers, replace(plan, batch=1, length=1, loss_chunk=0))
    base = model.get_base_model() if plan.r else model
    head = base.get_output_embeddings()
    model.train(plan.train).zero_grad()
    trained = plan.train and plan.r > 0
    ids = torch.zeros(plan.batch, plan.length, dtype=torch.long, device="meta")
    # several rows are padded: then the mask is needed
    with (
        LiveBytes(model, all_true=plan.batch == 1) as count,
        torch.set_grad_enabled(trained),
        as_on_its_device(plan),
        patch.object(moe, "_can_use_grouped_mm", return_value=False, create=True),
    ):
        hidden = base.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )[0]
        kept = count.live
        forward = count.peak - kept
        count.peak = kept
        if not trained:
            head(hidden[:, -1:]).float()
            return Activations(kept, forward, backward=0, loss=count.peak - kept)
        leaf = hidden.detach().requires_grad_()
        if plan.loss_chunk:  # at worst every token trains
            tokens = leaf.flatten(0, 1).clone()
            loss = chunked_loss.summed_cross_entropy(tokens, ids.flatten(), head, plan.loss_chunk)
            del tokens
        else:
            with _given(base, leaf):  # what the model computes after its head counts too
                loss = base(input_ids=ids, labels=ids).loss
        loss.backward()
        loss_and_back = count.peak - kept
        del loss
        count.peak = count.live
        hidden.backward(leaf.grad)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return Activations(kept, forward, count.peak - kept - gradients, loss_and_back)


class _Hidden(BaseModelOutputWithPast):
    """What the blocks give; of what some families ask for besides, such as router logits, there is
    nothing.
    """

    def __getattr__(self, name):
        return None


def _given(model: nn.Module, hidden: torch.Tensor) -> AbstractContextManager:
    """Inside, the model's blocks are left out: `hidden` (rows, tokens, width) is what they give."""

    def forward(*args, **kwargs):
        return _Hidden(last_hidden_state=hidden)

    return patch.object(model.base_model, "forward", forward)


def head_is_last(config) -> bool:
    """Whether a model's logits are what its head gives, up to a constant factor, as the head makes
    the same of hidden states with that factor: then the loss can be taken in slices. False where it
    cannot be told.

    It is asked of a model without weights: blocks and head are left out and large logits are given,
    which a cap would change.
    """
    model = _model_on_meta(1, Plan(config, checkpointing=False))
    head = model.get_output_embeddings()
    n_vocabulary, width = head.weight.shape
    logits = torch.linspace(1, 200, n_vocabulary).expand(1, 2, -1)

    def forward(hidden):
        return logits

    try:
        with (
            torch.no_grad(),
            _given(model, torch.zeros(1, 2, width)),
            patch.object(head, "forward", forward),
        ):
            seen = model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.float()
    except RuntimeError:  # its blocks cannot be left out (BART's)
        return False
    factors = seen / logits
    return bool(factors.isclose(factors.mean(), rtol=1e-3).all())


@functools.lru_cache(maxsize=16)
def _model_on_meta(n_layers: int, plan: Plan):
    """The model on *meta* with so few layers, its 4-bit layers and its attention replaced and its
    adapter attached.
    """
    load.ignore_checkpointing_warning()
    AttentionInterface.register("fused_on_meta", _attention)
    AttentionMaskInterface.register("fused_on_meta", sdpa_mask)
    config = copy.deepcopy(plan.config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        with suppress(AttributeError):  # where it follows from the number of layers
            config.layer_types = config.layer_types[:n_layers]
    dtype = plan.rest_dtype
    try:
        model = configs.meta_model(config, dtype=dtype, attn_implementation="fused_on_meta")
    except KitError:  # a family that knows its own kinds of attention alone
        model = configs.meta_model(config, dtype=dtype, attn_implementation="eager")
    with torch.device("meta"):
        for name, layer in linear_layers(model).items():
            has_bias = layer.bias is not None
            frozen = _Frozen4bit(layer.in_features, layer.out_features, has_bias, plan.dtype)
            model.set_submodule(name, frozen)
        if plan.head_4bit and not embeddings.are_tied(model):
            head = model.get_output_embeddings()
            slices = []
            for rows in embeddings.slice_rows(head.out_features):
                slices.append(_Frozen4bit(head.in_features, rows, False, plan.dtype))
            model.set_output_embeddings(embeddings.SlicedHead(slices, head.bias))
        model.is_loaded_in_4bit = True  # PEFT asks
        model.requires_grad_(False)
        if plan.train and plan.checkpointing:
            load.enable_checkpointing(model)
        if plan.r:
            lora = LoraConfig(
                r=plan.r,
                target_modules=adapted_names(model, plan.target_modules),
                lora_dropout=plan.lora_dropout,
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, lora)
            if lora.target_parameters:
                raise KitError(
                    "PEFT would adapt the experts of this model too, which are not linear layers",
                    value=config.model_type,
                    remedy="name layers of the attention in target_modules, as q_proj,v_proj",
                )
    return model
