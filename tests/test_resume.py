"""Never lose a run: hurt it in many ways, go on, and end with the same bits as a run that was never
stopped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from resume_driver import SMALL

from qlora_nb.errors import KitError
from qlora_nb.record import files, runs, seal
from qlora_nb.settings import validate
from qlora_nb.train import checkpoints

DRIVER = Path(__file__).parent / "resume_driver.py"


class Driver:
    """The program that forks for every run."""

    def __init__(self, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(DRIVER)]
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, folder, resume="no", hurt="none") -> subprocess.CompletedProcess:
        """One run to its end, or to where it is hurt."""
        asked = {
            "folder": str(folder),
            "resume": resume,
            "hurt": hurt,
            "out": str(self.out),
            "err": str(self.err),
        }
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(asked, code, self.out.read_text(), self.err.read_text())


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver.run
    driver.process.communicate()


def last(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def whole(drive, tmp_path_factory):
    """What an uninterrupted run ends with."""
    return last(drive(tmp_path_factory.mktemp("whole")))


def go_on(drive, folder, whole):
    """Continue the run in a folder and compare its end with the uninterrupted one's; returns what
    it said.
    """
    run = next((folder / "tiny").iterdir())
    again = drive(folder, "latest")
    ended = last(again)
    assert ended["losses"] == whole["losses"]
    assert ended["adapter"] == whole["adapter"]
    assert Path(ended["folder"]) == run
    assert runs.status_of(run) == "done"
    assert [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == list(range(1, 13))
    return again.stdout


def newest_file(run, step, name):
    return run / "checkpoints" / f"checkpoint-{step}" / name


def cut(run):
    path = newest_file(run, 8, "optimizer.pt")
    path.write_bytes(path.read_bytes()[:-100])


def flip(run):
    path = newest_file(run, 8, "adapter_model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(run):
    newest_file(run, 8, "rng_state.pth").unlink()


@pytest.mark.fault(12, 18, 19, 22, 23)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("hurt", "status", "says"),
    [
        ("int@7", 0, "resuming after step 7"),
        ("term@7", -signal.SIGTERM, "resuming after step 7"),
        ("kill@7", -signal.SIGKILL, "resuming after step 4"),
        ("kill-in@7", -signal.SIGKILL, "resuming after step 4"),
        ("kill@2", -signal.SIGKILL, "resuming after step 0"),
        ("kill-save@8", -signal.SIGKILL, "checkpoint-8 is left out: it has no seal"),
        ("quota@6", 1, "resuming after step 4"),
        ("oom@7", 1, "resuming after step 6"),
    ],
)
def test_a_hurt_run_ends_as_if_nothing_had_happened(drive, tmp_path, whole, hurt, status, says):
    hurt_run = drive(tmp_path, hurt=hurt)
    assert hurt_run.returncode == status, hurt_run.stderr[-1000:]
    told = runs.status_of(next((tmp_path / "tiny").iterdir()))
    assert told == {"int": "interrupted", "term": "interrupted", "kill": "died"}.get(
        hurt[:4].rstrip("@"), "failed"
    )
    assert says in go_on(drive, tmp_path, whole)


@pytest.mark.fault(16)
@pytest.mark.slow
def test_a_disk_that_fills_up_costs_nothing_that_was_written(drive, small_disk, whole):
    hurt = drive(small_disk, hurt="fill@6")
    assert hurt.returncode == 1
    said = hurt.stderr.strip().splitlines()[-1]
    assert said.startswith("qlora_nb.errors.KitError: ")
    assert "cannot be written: [Errno 28] No space left on device" in said
    assert 'make room there and run it again with resume="latest"' in said
    run = next((small_disk / "tiny").iterdir())
    assert runs.status_of(run) in ("failed", "died"), "the last word may have found no room"
    assert seal.newest_checkpoint(run).name == "checkpoint-4"
    (small_disk / "filler").unlink()
    assert "resuming after step 4" in go_on(drive, small_disk, whole)


@pytest.mark.fault(16)
def test_a_disk_too_small_is_told_before_the_first_step(drive, small_disk):
    (small_disk / "filler").write_bytes(bytes(14_000_000))
    refused = drive(small_disk)
    assert refused.returncode == 1
    assert "this run needs 0.00" in refused.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def killed_late(drive, tmp_path_factory):
    """A run killed after step 10, with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("late")
    assert drive(folder, hurt="kill@10").returncode == -signal.SIGKILL
    return folder


@pytest.mark.fault(20)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "optimizer.pt is missing or damaged"),
        (flip, "adapter_model.safetensors is missing or damaged"),
        (lose, "rng_state.pth is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_taken(
    drive, tmp_path, whole, killed_late, damage, says
):
    shutil.copytree(killed_late / "tiny", tmp_path / "tiny")
    damage(next((tmp_path / "tiny").iterdir()))
    said = go_on(drive, tmp_path, whole)
    assert f"checkpoint-8 is left out: {says}" in said
    assert "resuming after step 4" in said


@pytest.mark.fault(18)
@pytest.mark.slow
def test_hurt_twice(drive, tmp_path, whole):
    assert drive(tmp_path, hurt="kill@6").returncode == -signal.SIGKILL
    assert drive(tmp_path, "latest", "kill@9").returncode == -signal.SIGKILL
    ended = last(drive(tmp_path, "latest"))
    assert (ended["losses"], ended["adapter"]) == (whole["losses"], whole["adapter"])
    assert len(list((tmp_path / "tiny").iterdir())) == 1


@pytest.fixture(scope="module")
def stopped(drive, tmp_path_factory):
    """A run that was killed after its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    drive(folder, hurt="kill@6")
    return folder


def settings_of(folder, **values):
    return validate(
        {
            **SMALL,
            "lora_dropout": 0.1,
            "output_dir": str(folder),
            "save_steps": 4,
            "eval_rows": 1,
            **values,
        }
    )


@pytest.mark.fault(21)
def test_other_settings_are_refused_with_both_values(stopped, tmp_path):
    shutil.copytree(stopped / "tiny", tmp_path / "tiny")
    run = next((tmp_path / "tiny").iterdir())
    before = (run / "manifest.json").read_text()
    changed = settings_of(tmp_path, resume="latest", learning_rate=1e-3, r=4)
    with pytest.raises(KitError, match=r"r was 8, is 4, learning_rate was 0.004, is 0.001"):
        checkpoints.start(changed, "06_resume")
    assert (run / "manifest.json").read_text() == before  # refused before anything was written
    later = settings_of(
        tmp_path, resume="latest", save_steps=2, max_new_tokens=5
    )  # these do not change what is trained
    assert checkpoints.start(later, "06_resume").resumed


OTHER = {
    "seed": 1,
    "quant_type": "fp4",
    "double_quant": False,
    "dataset": "rows.json",
    "target_modules": "dense",
    "max_length": 64,
}
OTHER |= {
    "lora_alpha": 3.0,
    "lora_dropout": 0.2,
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
    "max_steps": 11,
    "packing": True,
}
OTHER |= {
    "model_id": "smollm2",
    "prompt_template": "alpaca",
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
}


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", OTHER)
def test_each_setting_that_changes_what_is_trained_is_refused(stopped, name):
    folder = seal.newest_checkpoint(next((stopped / "tiny").iterdir()))
    with pytest.raises(KitError, match=rf"something else: {name} was .*, is "):
        checkpoints.require_same(folder, settings_of(stopped, **{name: OTHER[name]}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("allow_slow", True), ("pythia", "1b"), ("gpu_gib", 8.0), ("blocksize", 128)],
)
def test_what_decides_nothing_may_be_another(stopped, name, value):
    """A run that was begun slowly on a CPU is resumed on a card, say."""
    folder = seal.newest_checkpoint(next((stopped / "tiny").iterdir()))
    checkpoints.require_same(folder, settings_of(stopped, **{name: value}))


@pytest.mark.fault(21)
def test_other_rows_are_refused(stopped):
    run = next((stopped / "tiny").iterdir())
    folder = seal.newest_checkpoint(run)
    settings = settings_of(stopped)
    with pytest.raises(KitError, match="training rows was"):
        checkpoints.require_same(folder, settings, "0" * 16)


def test_which_run_is_meant(stopped, tmp_path, capsys):
    run = next((stopped / "tiny").iterdir())
    assert runs.status_of(run) == "died"
    with pytest.raises(KitError, match="no unfinished run"):
        checkpoints.start(settings_of(stopped, resume=str(tmp_path)), "06_resume")
    fresh = checkpoints.start(settings_of(tmp_path, resume="latest"), "06_resume")
    assert not fresh.resumed
    assert "a new one starts" in capsys.readouterr().out


@pytest.mark.fault(24)
def test_one_writer_at_a_time(tmp_path):
    with files.sole_writer(tmp_path):
        code = f"from qlora_nb.record import files; from pathlib import Path; files.sole_writer(Path({str(tmp_path)!r})).__enter__()"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert other.returncode == 1
        assert "another process writes here" in other.stderr
    with files.sole_writer(tmp_path):
        pass


def test_only_the_newest_two_checkpoints_stay(whole):
    folders = sorted(p.name for p in (Path(whole["folder"]) / "checkpoints").iterdir())
    assert folders == ["checkpoint-12", "checkpoint-8"]
    assert all(not seal.damage(Path(whole["folder"]) / "checkpoints" / name) for name in folders)
    adapter = Path(whole["folder"]) / "checkpoints" / "checkpoint-12"
    assert not [p for p in adapter.iterdir() if p.suffix in (".bin", ".pkl")]
