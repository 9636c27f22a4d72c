"""Run folders of version 0.1 are still of use: an unfinished one is resumed, the adapter of a
finished one is loaded.

`tests/data/run_of_0.1.tar.gz` holds two folders that version 0.1 wrote with the settings below:
`unfinished` was killed (SIGKILL) after step 3, its checkpoint is of step 2; `finished` went on to
step 6 and has no checkpoints any more, to be small.
"""

import json
import tarfile
from pathlib import Path

import open_cells
import pytest
import torch
from safetensors.torch import load_file

from qlora_nb.answer import adapters
from qlora_nb.errors import KitError
from qlora_nb.model import data, load
from qlora_nb.record import runs
from qlora_nb.settings import validate
from qlora_nb.train import checkpoints

ARCHIVE = Path(__file__).parent / "data" / "run_of_0.1.tar.gz"
NOTEBOOK = "06_finetune_pythia_12b"
SETTINGS_OF_0_1 = {
    "profile": "tiny",
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_rows": 24,
    "max_length": 96,
    "eval_rows": 1,
    "r": 1,
    "target_modules": "query_key_value",
    "lora_dropout": 0.1,
    "save_steps": 2,
}


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def trained(settings):
    tokenizer = load.load_tokenizer(settings)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    run = checkpoints.start(settings, NOTEBOOK)
    return open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)


def logged_losses(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_an_unfinished_run_is_resumed_and_ends_as_one_that_was_never_stopped(folder, capsys):
    """On the CPU that wrote the folder the bits are the same; another one sums in another order."""
    settings = validate({**SETTINGS_OF_0_1, "output_dir": str(folder / "today")})
    whole = trained(settings)
    resumed = trained(settings.replace(resume=str(folder / "unfinished")))
    assert "after step 2" in capsys.readouterr().out
    assert resumed["run"].folder == folder / "unfinished"
    assert runs.status_of(folder / "unfinished") == "done"
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert logged_losses(folder / "unfinished") == resumed["losses"]
    assert resumed["losses"] == pytest.approx(logged_losses(folder / "finished"), rel=1e-3)
    found = load_file(resumed["adapter"] / "adapter_model.safetensors")
    expected = load_file(folder / "finished" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_other_settings_are_refused_in_one_sentence(folder):
    settings = validate({**SETTINGS_OF_0_1, "r": 2, "resume": str(folder / "unfinished")})
    with pytest.raises(KitError, match=r"this run was started with something else: r was 1, is 2"):
        checkpoints.start(settings, NOTEBOOK)


def test_the_adapter_of_a_finished_run_is_found_and_changes_what_the_base_computes(folder):
    adapter = folder / "finished" / "adapter"
    settings = validate({"adapter": str(adapter)})
    assert runs.status_of(folder / "finished") == "done"
    assert adapters.find_adapter(settings)[0] == adapter
    model = adapters.load_adapter(load.load_base(settings), adapter)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with adapters.base_or_tuned(model, tuned=False):
            base = model(input_ids=ids).logits
    assert (tuned - base).abs().max() > 0.01


def test_a_folder_that_is_no_run_is_not_resumed(tmp_path):
    settings = validate({"resume": str(tmp_path), "output_dir": str(tmp_path / "runs")})
    with pytest.raises(KitError, match="this is no unfinished run"):
        checkpoints.start(settings, "06_finetune_pythia_12b")
    assert list(tmp_path.iterdir()) == []
