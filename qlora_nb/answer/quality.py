"""How well does a model still do its work when its weights are replaced by what a 4-bit code leaves
of them?

`replaced_weights` lends a model other linear weights and gives the old ones back. `recall` asks
facts the pocket model has learnt by heart (almanac prompts): they show 4-bit damage clearly.
`text_losses` is the usual measure, the mean loss a token over texts (its exponential is the
perplexity of QLoRA paper, table 2); for the pocket model's stories it hardly moves, because their
loss is mostly the stories' own randomness. `assess` takes three samples, so that a difference can
be compared with the spread of the samples. The last functions look at the weights themselves: their
distribution, and the bytes they take.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import psutil
import torch

from qlora_nb import pocket
from qlora_nb.answer import adapters, evaluate
from qlora_nb.model import configs, device
from qlora_nb.model.linear_layers import dense_weight, linear_layers

N_STORIES = 24
"""Stories in a text measurement, a third of them in each sample; every set of weights reads the
same ones.
"""


def replaced_weights(
    model, change: Callable[[torch.Tensor], torch.Tensor]
) -> AbstractContextManager:
    """Inside the context every linear weight in the blocks (not the head) is `change(weight)`;
    afterwards the old one is back.

    Args:
        model: a model in 16 or 32 bit.
        change: (out, in) tensor → tensor of the same shape.
    """
    changed = {}
    for module in linear_layers(model).values():
        weight = module.weight
        changed[weight] = change(weight.data).to(weight.dtype)
    return adapters.replaced_numbers(changed)


@torch.no_grad()
def recall(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask for each of the almanac's 720 facts and look at the first token of the answer.

    Args:
        model, tokenizer: any causal language model; only the pocket model knows the almanac.

    Returns:
        (n,) loss of the right first answer token for each fact (nats), and (n,) True where it is
        the model's first choice.
    """
    facts = pocket.read("almanac")
    answers = [f" {fact['answer']}" for fact in facts]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    wanted = torch.tensor([ids[0] for ids in answer_ids])
    asked = tokenizer(
        [fact["prompt"] for fact in facts],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).to(model.device)
    last = asked["attention_mask"].sum(dim=1) - 1
    logits = model(asked["input_ids"], asked["attention_mask"]).logits
    logits = logits[range(len(last)), last].float().cpu()
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return losses, logits.argmax(dim=1) == wanted


def text_losses(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Mean loss a token (nats) of each text's first 128 tokens, (len(texts),). Perplexity of a
    sample is exp of their mean.
    """
    encoded = tokenizer(texts, truncation=True, max_length=128, add_special_tokens=False)
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded["input_ids"]]
    losses = evaluate.row_losses(model, tokenizer, rows)
    return evaluate.mean_loss(losses[:, None])


@dataclass(frozen=True)
class Quality:
    """What one set of weights can do, over three samples of the same kind.

    Attributes:
        name: which weights, for example "NF4".
        losses: mean loss in each sample (nats).
        recall: share of facts known in each sample (0 to 1); empty where there is nothing to know
            by heart.
    """

    name: str
    losses: tuple[float, ...]
    recall: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean over the samples (nats)."""
        return statistics.fmean(self.losses)

    @property
    def known(self) -> float:
        """Share of facts known, mean over the samples (0 to 1)."""
        return statistics.fmean(self.recall)


def assess(name: str, model, tokenizer, knows_almanac: bool, seed: int = 0) -> Quality:
    """Loss (and recall) of a model over three samples of text on which it can be right.

    Args:
        name: how the result is called.
        knows_almanac: True for the pocket model: samples are thirds of the 720 almanac facts. False
            for any other model: 8 of the kit's little stories a sample, each model sees the same
                ones.
        seed: which stories.
    """

    def thirds(numbers: torch.Tensor) -> tuple[float, ...]:
        return tuple(numbers[i::3].double().mean().item() for i in range(3))

    if knows_almanac:
        losses, known = recall(model, tokenizer)
        return Quality(name, thirds(losses), thirds(known))
    first = N_STORIES * (seed % 10)
    stories = [row["text"] for row in pocket.read("stories")[first : first + N_STORIES]]
    return Quality(name, thirds(text_losses(model, tokenizer, stories)))


def comparison_settings(settings):
    """The settings to compare datatypes with: these, or the pocket model's where two unquantized
    copies do not fit, said aloud.

    Comparing needs the unquantized weights and one changed copy of the linear layers at the same
    time.
    """
    on_gpu = device.on_gpu()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    shapes = configs.meta_model(configs.config_of(settings.model_id))
    n_weights = sum(weight.numel() for weight in shapes.parameters())
    needed = 2 * n_weights * (2 if on_gpu else 4)  # in 16 bit, on a CPU in 32
    if needed < 0.8 * free:
        return settings
    sizes = f"needs {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f}"
    print(f"{settings.model_id} unquantized with a changed copy {sizes}: using the pocket model")
    return settings.replace(model_id="pocket")


def normalized_weights(model) -> torch.Tensor:
    """Weights of every linear layer, each layer divided by its standard deviation; the first ones
    of a layer if there are many.

    Returns:
        (n,) float32 on the CPU; n is about 2^22 at most (each layer gives whole blocks of 4096).
    """
    layers = linear_layers(model).values()
    share = max(1, 2**22 // len(layers) // 4096) * 4096
    parts = []
    for module in layers:
        weights = dense_weight(module).flatten().cpu()
        parts.append(weights[:share] / weights.std())
    return torch.cat(parts)
