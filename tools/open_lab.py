"""`qlora-nb lab`: JupyterLab on the learner's own copies, without outputs, so that a guess comes
before its answer.

Nothing of the user's own Jupyter is changed. `lab_defaults/` is one more folder of its
configuration, for this start alone (JUPYTER_CONFIG_PATH). It holds defaults, which the user's own
settings override: Markdown opens as a page, and nobody is asked about Jupyter's news. The layout of
the windows is kept beside the copies.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import nbformat

from qlora_nb import sources
from qlora_nb.batch import one_notebook, sequence
from qlora_nb.errors import KitError
from qlora_nb.record import files

MINE = "my_notebooks"
"""The learner's folder in the repository."""

START = "start.md"
"""The page that is opened first: the map of the notebooks."""

BY_SSH = """\
You are here by ssh. First run this on your own computer, and leave it open:
  ssh -N -L {port}:localhost:{port} -p {there[3]} {user}@{there[2]}"""

IN_WSL = "In WSL: open it in a browser of Windows, whose localhost leads here."

IN_A_CONTAINER = """\
In a container: its port has to be published, as by docker run -p {port}:{port}, and Jupyter has to
listen outside it: qlora-nb lab --ip=0.0.0.0"""


def main(more: list[str]) -> None:
    """Copy what is not there yet, and open it; `more` are options for Jupyter itself."""
    root = sources.project_root()
    copy_for_learning(root / "notebooks", root / MINE)
    serve(root, more)


def copy_for_learning(source: Path, target: Path) -> list[Path]:
    """Copy notebooks without outputs, and the start page. A copy that is already there is the
    learner's own and is never touched. Returns the fresh copies of notebooks.
    """
    notebooks = sequence.choose(source)
    fresh = []
    kept = []
    with files.writing(target, "make room there, or remove what is in the way"):
        target.mkdir(exist_ok=True)
        for path in notebooks:
            copy = target / path.name
            if copy.exists():
                kept.append(copy.name)
                continue
            notebook = one_notebook.read(path)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs = []
                    cell.execution_count = None
            nbformat.write(notebook, copy)
            fresh.append(copy)
        page = source / START
        if page.is_file() and not (target / START).exists():
            shutil.copyfile(page, target / START)
    if kept:
        print(f"kept your {', '.join(kept)} (remove one to get a fresh copy)")
    print(f"{len(fresh)} fresh copies in {target}")
    return fresh


def serve(root: Path, more: list[str]) -> None:
    """Run JupyterLab in this process until it is stopped, and print where to click.

    Args:
        root: the repository; the start page lies in its folder `my_notebooks`.
        more: options for Jupyter itself, as `--port=9000`.

    Raises:
        KitError: JupyterLab is not installed.
    """
    if find_spec("jupyterlab") is None:
        raise KitError("JupyterLab is missing", remedy='run: pip install "qlora-nb[lab]"')
    from jupyterlab.labapp import LabApp

    theirs = os.environ.get("JUPYTER_CONFIG_PATH", "")
    ours = str(Path(__file__).parent / "lab_defaults")
    os.environ["JUPYTER_CONFIG_PATH"] = f"{ours}{os.pathsep}{theirs}".rstrip(os.pathsep)
    options = [
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{MINE}/{START}",
        f"--LabApp.workspaces_dir={root / MINE / '.lab'}",
        "--Application.log_level=ERROR",
        "--allow-root",
    ]
    server = LabApp.initialize_server(argv=[*options, *more])
    port = server.port
    wanted = server.config.ServerApp.get("port", 8888)
    if wanted not in (0, port):
        print(f"port {wanted} is taken, perhaps by an earlier start; this one has {port}")
    address = server.local_url.replace("127.0.0.1", "localhost")
    print(f"open this: {address}")
    server.identity_provider.token_generated = False  # Jupyter need not say it again
    hint = where_the_user_sits(port)
    if hint:
        print(hint)
        server.open_browser = False  # nobody would see it
    print("To stop it: Ctrl-C, twice.", flush=True)
    server.start()


def where_the_user_sits(port: int) -> str:
    """What has to be done to reach a port of this machine over ssh, from Windows, or from outside
    a container; empty if the user seems to sit at this very machine.
    """
    there = os.environ.get("SSH_CONNECTION", "").split()
    if len(there) == 4:  # the client's address and port, this machine's address and port
        return BY_SSH.format(port=port, there=there, user=os.environ.get("USER", "you"))
    if "WSL_DISTRO_NAME" in os.environ:
        return IN_WSL
    # docker, podman, Kubernetes
    marks = {"container", "KUBERNETES_SERVICE_HOST"}
    if Path("/.dockerenv").exists() or not marks.isdisjoint(os.environ):
        return IN_A_CONTAINER.format(port=port)
    return ""
