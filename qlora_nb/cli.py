"""The command line: look at the machine, fetch ahead, plan the memory, run the notebooks.

Each command is a thin door to a room. Every heavy import stands inside the command that needs it,
so that `--help` and a misspelt name answer at once. A refusal (`KitError`) is printed as one
paragraph on stderr and exits with 2; a failed notebook exits with 1; Ctrl-C with 130.
"""

import importlib
import json
import re
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from qlora_nb import __version__, cards, machine, sources
from qlora_nb.errors import MORE_MEMORY, KitError, is_out_of_memory
from qlora_nb.memory import preflight
from qlora_nb.record.redaction import redact


class _Group(TyperGroup):
    """Commands whose refusals are a sentence, not a traceback, and whose results are exit codes."""

    def main(self, *args, **options):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone
        return super().main(*args, **options)

    def invoke(self, ctx):
        try:
            ctx.exit(super().invoke(ctx))
        except KeyboardInterrupt:
            typer.echo("qlora-nb: stopped by you", err=True)
            raise SystemExit(130) from None
        except Exception as error:
            refusal = error
            if not isinstance(error, KitError):
                if not is_out_of_memory(error):
                    raise
                refusal = KitError("memory ran out", value=error, remedy=MORE_MEMORY)
            typer.echo(f"qlora-nb: {refusal}", err=True)
            raise SystemExit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn QLoRA by taking it apart, then run it: from an offline CPU to pythia-12b.",
)

TAKES_PARAMETERS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that take `-p NAME VALUE`: typer has no option of two values that repeats."""

PARAMETERS = (
    "-p NAME VALUE sets a parameter, as often as needed. All of them with their meaning: "
    "docs/parameters.md"
)

with_parameters = app.command(context_settings=TAKES_PARAMETERS, epilog=PARAMETERS)

Profile = Annotated[str, typer.Option(help="tiny, smollm2, t4 or full")]
Processes = Annotated[
    int, typer.Option(min=1, help="share each step among so many: one for each card")
]
Out = Annotated[str, typer.Option(help="folder for everything written (else runs)")]
Shard = Annotated[
    Literal["none", "fsdp"], typer.Option(help="fsdp: each process holds a share of every tensor")
]


def _settings(ctx: typer.Context, profile: str, **options: object):
    """The settings that a command's own options and its -p NAME VALUE make."""
    from qlora_nb.settings import resolve
    from qlora_nb.spellings import parameters

    preflight.require_address_space()
    return resolve({"profile": profile, **options, **parameters(ctx.args)})


def _with_its_adapter(settings):
    """The settings that an adapter was trained with, and its folder; says where it comes from."""
    from qlora_nb.answer import adapters

    folder, where_from = adapters.find_adapter(settings)
    print(where_from)
    return adapters.asked_as_trained(settings, folder), folder


@app.callback()
def _command(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        print(f"qlora-nb {__version__}")
        raise typer.Exit


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="for an issue: no secrets")] = False,
) -> None:
    """This machine, its packages, the profile that fits. Exits with 1 if a package is missing or
    outside its range.
    """
    with suppress(ImportError, OSError):
        importlib.import_module("torch")  # so that `remarks` can say what it is built for
    here = machine.this_machine()
    described = machine.describe(here)
    if here.gpu_remedy:
        described["remedy"] = here.gpu_remedy
    remarks = cards.remarks(here.gpus, here.system)
    constraints = sources.project_root() / "constraints.txt"
    pins = constraints.read_text() if constraints.is_file() else ""
    problems = []
    packages = {}
    for version in machine.versions():
        verdict = version.problem or "ok"
        pin = re.search(rf"^{version.package}==([^\s;]+)", pins, re.MULTILINE)
        if version.problem:
            problems.append(version.package)
        elif pin and pin[1] != version.installed.split("+")[0]:
            verdict = f"tested with {pin[1]}"
        packages[version.package] = (version.installed or "-", verdict)
    can = "can" if sources.hub_is_reachable() else "cannot"
    hub = f"{sources.hub_endpoint()} {can} be reached"
    profile = _fitting_profile(here)
    if as_json:
        found = {"qlora-nb": __version__, "machine": described, "remarks": remarks}
        found |= {"packages": packages, "hub": hub, "profile": profile}
        print(json.dumps(redact(found), indent=1))
    else:
        for what, how_much in described.items():
            print(f"{what:10} {how_much}")
        for line in remarks:
            print(line)
        for package, (installed, verdict) in packages.items():
            print(f"  {package:18} {installed:12} {verdict}")
        print(f"hub: {hub}\ntake this profile: {profile}")
    raise typer.Exit(1 if problems else 0)


def _fitting_profile(here) -> str:
    from qlora_nb.settings import validate

    if here.gpus:
        for name in ("full", "t4"):
            settings = validate({"profile": name})
            with suppress(KitError):
                preflight.require_fit(settings, here)
                return f"{name} ({settings.model_id}), or any smaller one"
    return "tiny (ships with the kit); smollm2 after `qlora-nb fetch smollm2`"


@app.command()
def fetch(
    what: Annotated[
        str, typer.Argument(help="smollm2, or a hub model such as EleutherAI/pythia-410m")
    ],
    dataset: Annotated[bool, typer.Option("--dataset", help="the name is a data set's")] = False,
) -> None:
    """Download a model or a data set ahead. Run it again after a cut: whole files are kept."""
    from qlora_nb.model import fetch

    if what == "smollm2":
        fetch.fetch_smollm2()
    else:
        fetch.fetch_repo(what, "dataset" if dataset else "model")


@with_parameters
def plan(
    ctx: typer.Context,
    profile: Profile = "tiny",
    gpu_gib: Annotated[float | None, typer.Option(help="memory of the card you mean (GiB)")] = None,
    processes: Processes = 1,
    shard: Shard = "none",
    as_json: Annotated[bool, typer.Option("--json", help="the lines of the peak alone")] = False,
) -> int:
    """Every byte of a run's peak memory before anything is loaded, and what would lower it."""
    settings = _settings(ctx, profile, gpu_gib=gpu_gib)
    from qlora_nb.memory import plan_report

    fits = plan_report.show(settings, gpu_gib, processes, shard, as_json)
    return int(not fits)


@with_parameters
def data(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="a file, a folder, or a data set of the hub")],
    profile: Profile = "tiny",
) -> None:
    """What of a data set trains, what is left out and why, and its first row as the model of the
    profile sees it.
    """
    settings = _settings(ctx, profile, dataset=name)
    preflight.require_model_and_data(settings)
    from qlora_nb.model import data_report, load

    print(data_report.check(settings, load.load_tokenizer(settings), every_row=True))


@with_parameters
def train(
    ctx: typer.Context,
    profile: Profile = "tiny",
    processes: Processes = 1,
    shard: Shard = "none",
) -> int:
    """Fine-tune as notebook 06 does, without a notebook; -p resume latest resumes."""
    settings = _settings(ctx, profile)
    if processes == 1:
        from qlora_nb.train import run

        return run.in_this_process(settings, shard)
    preflight.refuse_many_processes()
    from qlora_nb.train import launch

    arguments = ["--shard", shard, "-p", "profile", profile, *ctx.args]
    return launch.together(processes, arguments)


@with_parameters
def script(
    ctx: typer.Context,
    profile: Profile = "tiny",
    out: Annotated[str, typer.Option(help="a folder for the files (else a new one in runs)")] = "",
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="train.py for several processes, as for one")
    ] = False,
) -> None:
    """Write a run as train.py, ask.py and rows.jsonl, which need nothing of this kit."""
    settings = _settings(ctx, profile)
    preflight.require_model_and_data(settings)
    from qlora_nb.train import script

    for path in script.write_untrained(settings, out, torchrun):
        print(path)


@with_parameters
def generate(
    ctx: typer.Context,
    profile: Profile = "tiny",
    prompts: Annotated[
        str, typer.Option(help="a .txt with a prompt a line, or a data file; else the profile's")
    ] = "",
    out: Annotated[
        str, typer.Option(help="a .jsonl for the answers; called again it resumes (else printed)")
    ] = "",
    base: Annotated[bool, typer.Option("--base", help="without the adapter")] = False,
) -> None:
    """Answer prompts greedily with the tuned model, in batches: with the newest adapter, or
    -p adapter runs/…/adapter.
    """
    settings = _settings(ctx, profile)
    from qlora_nb.answer import adapters, generate, prompt_files
    from qlora_nb.model import load

    if not base:
        settings, folder = _with_its_adapter(settings)
    preflight.refuse_what_cannot_run(settings)
    if prompts:
        rows = prompt_files.read_rows(prompts, settings.columns, settings.prompt_template)
    else:
        rows = [generate.row_of(prompt, settings.prompt_template) for prompt in settings.prompts]
    tokenizer = load.load_tokenizer(settings)
    model = load.load_base(settings)
    if not base:
        model = adapters.load_adapter(model, folder)
    if out:
        target = sources.local_path(out)
        n_answered = prompt_files.answer_file(model, tokenizer, rows, target, settings)
        print(f"{n_answered} of {len(rows)} answered into {out}")
        return
    rows, _ = generate.askable(rows, tokenizer, model, settings)
    answers = generate.answer_all(model, tokenizer, rows, settings)
    for row, text in zip(rows, answers, strict=True):
        print(f"{row['instruction']}\n    {text!r}")


@with_parameters
def merge(
    ctx: typer.Context,
    out: Annotated[str, typer.Option(help="the folder to write; what lies there is replaced")],
    profile: Profile = "tiny",
) -> None:
    """Write base and adapter as one plain model, without bitsandbytes: the newest adapter, or
    -p adapter runs/…/adapter.
    """
    settings = _settings(ctx, profile)
    from qlora_nb.answer import merge
    from qlora_nb.model import load

    settings, folder = _with_its_adapter(settings)
    preflight.refuse_what_cannot_run(settings)
    model = merge.merged(settings, folder)
    card = merge.card_facts(folder, settings, "dequantized")
    print(merge.export(model, load.load_tokenizer(settings), sources.local_path(out), card))


@with_parameters
def run(
    ctx: typer.Context,
    profile: Profile = "tiny",
    only: Annotated[
        str, typer.Option(help="beginnings of notebook names, as 03,04 (else all)")
    ] = "",
    out: Out = "",
    resume: Annotated[str, typer.Option(help="latest, or a sequence folder to resume")] = "no",
    solved: Annotated[
        bool,
        typer.Option("--solutions", help="with every exercise solved (again with --resume)"),
    ] = False,
) -> int:
    """Execute the notebooks in order and write a report."""
    from qlora_nb.batch import sequence, solutions
    from qlora_nb.spellings import parameters

    given = {"profile": profile}
    if out:
        given["output_dir"] = str(sources.local_path(out).absolute())
    given.update(parameters(ctx.args))
    names = [part.strip() for part in only.split(",")] if only else None
    notebooks = sources.project_root() / "notebooks"
    with TemporaryDirectory() as folder:
        if solved:
            solutions.copy_solved(notebooks, Path(folder))
            notebooks = Path(folder)
        summary = sequence.run_sequence(given, names, notebooks, resume=resume)
    return int(summary["status"] != "done")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="a TOML file with tables fixed and grid")],
    workers: Annotated[int, typer.Option(min=0, help="runs at a time on this machine")] = 1,
    storage: Annotated[
        str, typer.Option(help="URL of a database for several machines (else SQLite; never on NFS)")
    ] = "",
    out: Out = "",
    name: Annotated[str, typer.Option(help="of the sweep (else made from its points)")] = "",
    grace: Annotated[
        int, typer.Option(min=1, help="seconds without a sign of life: the worker is dead")
    ] = 60,
) -> int:
    """Run notebook 06 at every point of a grid. The same command again does what is missing."""
    from qlora_nb.batch import leaderboard
    from qlora_nb.batch import sweep as sweeps

    folder, all_done = sweeps.run(grid, workers, storage, out, name, grace)
    with suppress(KitError):  # not one of them began
        print(leaderboard.as_text(folder))
    return int(not all_done)


@app.command()
def leaderboard(
    folder: Annotated[Path, typer.Argument(help="a sweep's folder, or any with runs in it")],
) -> None:
    """The runs of notebook 06 below a folder: means over their seeds, the lowest loss first."""
    from qlora_nb.batch import leaderboard as board

    print(board.as_text(folder))


@app.command(context_settings=TAKES_PARAMETERS)
def lab(ctx: typer.Context) -> None:
    """JupyterLab on your own copies in my_notebooks/, without outputs, so that your guess comes
    before the answer. Options are Jupyter's, as --port=9000 or --no-browser.
    """
    program = Path(__file__).parents[1] / "tools" / "open_lab.py"
    if not program.is_file():
        remedy = "run it in the kit's repository (a clone)"
        raise KitError("only the repository has notebooks to open", remedy=remedy)
    runpy.run_path(str(program))["main"](ctx.args)


if __name__ == "__main__":
    app()
