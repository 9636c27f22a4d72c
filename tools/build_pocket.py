"""Train the pocket model from nothing: `python tools/build_pocket.py` (about 40 minutes on two CPU
cores).

A GPT-NeoX of 2.2 million parameters (Pythia's architecture: rotary_pct 0.25, parallel residual,
GELU, untied embeddings, `<|endoftext|>` = 0 and `<|padding|>` = 1) reads stories and almanac pages
made by `micro_world` and is stored as float16 safetensors in `qlora_nb/pocket/`. It never sees an
instruction; teaching it to answer is the work of notebook 06.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
import tempfile
import time
from pathlib import Path

import datasets
import micro_world
import open_cells
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from qlora_nb import pocket
from qlora_nb.answer import evaluate
from qlora_nb.model import data, load
from qlora_nb.pocket import ADAPTER_DIR, DATA_DIR, HERE, MODEL_DIR, REWRITER_DIR
from qlora_nb.record import runs, seal
from qlora_nb.settings import validate


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the micro-world is one token and any other text still
    has an encoding.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1280,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        bos_token=special[0],
        pad_token=special[1],
        model_max_length=512,
    )


def build_model(n_tokens: int) -> GPTNeoXForCausalLM:
    """The untrained network; its vocabulary is rounded up to a multiple of 64, as Pythia's is."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=-(-n_tokens // 64) * 64,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=768,
            max_position_embeddings=512,
            rotary_pct=0.25,
            use_parallel_residual=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def batches(tokenizer, seed: int, batch: int, steps: int):
    """`steps` batches of (input_ids, labels), documents of like length together so that little is
    padding.

    The first half has easy stories alone: reading is learnt soonest where one thing of each sort is
        told.
    """
    for pool in range(-(-steps // 64)):
        texts = micro_world.documents(
            seed + pool, 64 * batch, hard_share=0.0 if pool * 64 < steps / 2 else 0.4
        )
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        random.Random(seed + pool).shuffle(groups)
        for group in groups[: steps - pool * 64]:
            width = max(map(len, group)) + 1
            ids = torch.ones(batch, width, dtype=torch.long)
            for i, row in enumerate(group):
                ids[i, : len(row) + 1] = torch.tensor([*row, 0])
            yield ids, ids.masked_fill(ids == 1, -100)


@torch.no_grad()
def reading_score(model, tokenizer, n: int = 240) -> float:
    """Share of held-out questions the base answers inside a dialogue, the form it was trained
    on.
    """
    rows = [
        r for r in micro_world.instruction_rows("test", 3 * n) if r["instruction"].endswith("?")
    ][:n]
    prompts = [f'{r["input"]} "{r["instruction"].split(". ")[-1]}" "' for r in rows]
    encoded = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
    )
    out = model.generate(**encoded, max_new_tokens=8, do_sample=False, pad_token_id=1)
    texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :])
    return sum(t.split('"')[0] == r["output"] for t, r in zip(texts, rows, strict=True)) / len(rows)


@torch.no_grad()
def almanac_score(model, tokenizer) -> float:
    """Share of the almanac's facts the model knows by heart (first word after the prompt)."""
    prompts = micro_world.almanac_prompts()
    encoded = tokenizer(
        [p for p, _ in prompts],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )
    out = model.generate(**encoded, max_new_tokens=1, do_sample=False, pad_token_id=1)
    said = tokenizer.batch_decode(out[:, -1:])
    return sum(s.strip() == answer for s, (_, answer) in zip(said, prompts, strict=True)) / len(
        prompts
    )


def train(
    steps: int, seed: int, out: Path, batch: int = 32, lr: float = 4e-3, report_every: int = 250
):
    """Train for `steps` steps and return model, tokenizer and a record of the run."""
    torch.manual_seed(seed)
    texts = micro_world.documents(seed, 20_000)
    asked = [
        data.prompt_of(row, "alpaca") + row["output"]
        for row in micro_world.instruction_rows("train", 2_000)
    ]
    tokenizer = build_tokenizer(texts + asked)
    model = build_model(len(tokenizer)).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def shape(step: int) -> float:
        """A short warm-up, then linearly to zero."""
        return min(1.0, (step + 1) / 100) * (1 - step / steps)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in optimizers]
    started, losses = time.time(), []
    for step, (ids, labels) in enumerate(
        batches(tokenizer, seed * 1_000_003 + 1, batch, steps), start=1
    ):
        loss = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for thing in [*optimizers, *schedulers]:
            thing.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % report_every == 0 or step == steps:
            model.eval()
            scores = {
                "reading": reading_score(model, tokenizer),
                "almanac": almanac_score(model, tokenizer),
            }
            model.train()
            save(model, tokenizer, out)  # an interrupted build leaves its last report
            mean = sum(losses[-report_every:]) / len(losses[-report_every:])
            print(
                f"step {step}/{steps} loss {mean:.4f} {scores} {time.time() - started:.0f} s",
                flush=True,
            )
    record = {"steps": steps, "seed": seed, "batch": batch, "lr": lr, "loss": mean, **scores}
    record |= {"seconds": round(time.time() - started), "torch": torch.__version__}
    return record


def save(model, tokenizer, out: Path) -> None:
    """Write float16 safetensors, configuration and tokenizer; the float32 model itself is left as
    it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def build_data(out: Path = DATA_DIR) -> None:
    """Write what the notebooks read of the micro-world: instructions to train and to test on,
    facts, stories.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "train": micro_world.instruction_rows("train", 12_480),
        "test": micro_world.instruction_rows("test", 1_200),
        "almanac": [
            {"prompt": prompt, "answer": answer} for prompt, answer in micro_world.almanac_prompts()
        ],
        "sentences": micro_world.sentence_rows("test", 120),
        "stories": [
            {"text": text}
            for k in range(10)
            for text in micro_world.documents(1_000_000 + k, 24, almanac_share=0.0)
        ],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl.gz").write_bytes(
            gzip.compress(lines.encode(), mtime=0)
        )  # the same bytes on every day


def build_adapter(out: Path = ADAPTER_DIR) -> dict[str, float]:
    """Fine-tune the stored pocket model with profile `tiny` and store the adapter for readers who
    open notebook 07 first.
    """
    settings = validate({})
    train, held_out = data.load(settings)
    return tune(settings, train, held_out, out)


def build_rewriter(out: Path = REWRITER_DIR) -> dict[str, float]:
    """A second adapter for notebook 07, of the same base: it makes a question of a sentence. What
    it is asked to rewrite there, it has never read (half a minute on two cores).
    """
    settings = validate({"sample_steps": 0})
    rows = micro_world.sentence_rows("train", settings.max_steps * settings.rows_in_a_step)
    train = datasets.Dataset.from_list(rows)
    held_out = datasets.Dataset.from_list(pocket.read("sentences"))
    return tune(settings, train, held_out, out)


def tune(
    settings, train: datasets.Dataset, held_out: datasets.Dataset, out: Path
) -> dict[str, float]:
    """Train an adapter of the stored model with notebook 06's cells, store it in `out`, and ask it
    held-out rows.
    """
    tokenizer, model = load.load_tokenizer(settings), load.load_base(settings)
    model = open_cells.attach_adapter(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = runs.Run(settings.replace(output_dir=folder), "pocket_adapter")
        rows = data.tokenize_rows(train, tokenizer, settings)
        result = open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)
        out.mkdir(parents=True, exist_ok=True)
        weights = load_file(result["adapter"] / "adapter_model.safetensors")
        save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_model.safetensors").chmod(0o644)
        config = json.loads((result["adapter"] / "adapter_config.json").read_text())
    print(f"trained in {result['seconds']:.0f} s")
    config |= {
        "base_model_name_or_path": "pocket",
        "target_modules": sorted(config["target_modules"]),
    }  # no path of this machine
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return evaluate.held_out(model, tokenizer, held_out, settings)["exact_match"]


def write_seal() -> None:
    """The hashes of all that ships, so that a damaged copy of the kit is known."""
    contents = {}
    for part in (ADAPTER_DIR, DATA_DIR, MODEL_DIR, REWRITER_DIR):
        for path in sorted(part.iterdir()):
            name = path.relative_to(HERE).as_posix()
            contents[name] = seal.size_and_hash(path)
    text = json.dumps({"files": contents}, indent=1) + "\n"
    (HERE / seal.SEAL).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument(
        "--adapter", action="store_true", help="build only the adapter, on the stored model"
    )
    parser.add_argument(
        "--rewriter", action="store_true", help="build only the second adapter, which asks"
    )
    parser.add_argument("--data", action="store_true", help="build only the data files")
    options = parser.parse_args()
    if options.data:
        build_data()
        write_seal()
        return
    if options.adapter:
        print(f"exact match: {build_adapter()}")
        write_seal()
        return
    if options.rewriter:
        print(f"exact match: {build_rewriter()}")
        write_seal()
        return
    record = train(options.steps, options.seed, options.out, lr=options.lr)
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_seal()
    print(f"written to {options.out}: {record}")


if __name__ == "__main__":
    main()
