"""Write docs/parameters.md: every parameter, what it means, and what each profile sets.

    make parameters

The schema (`qlora_nb/settings.py`) has the meanings and bounds, `qlora_nb/profiles.toml` the values
and their reasons; the page repeats both, and a test writes it again.
"""

from __future__ import annotations

from pathlib import Path

from qlora_nb.settings import PROFILES, Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parameters.md"
HEAD = """# Every parameter

Written by `tools/parameters_page.py` from the schema and the profiles.

A notebook takes them in its cell of parameters, papermill and the commands by `-p NAME VALUE`.
What is not set has its profile's value; the last column has the reasons, in the profiles' order.
The names are PEFT's, transformers' and bitsandbytes' own where they have one.

| parameter | what it is | tiny | smollm2 | t4 | full | why |
|---|---|---|---|---|---|---|
"""


def cell(value: object) -> str:
    """A value in a cell of Markdown."""
    return f"`{value}`".replace("|", "\\|")


def page() -> str:
    """The page."""
    lines = []
    for name, field in Settings.model_fields.items():
        if name == "profile":
            continue
        defaults = [PROFILES[profile][name] for profile in PROFILES]
        values = [cell(default.value) for default in defaults]
        reasons = dict.fromkeys(default.reason for default in defaults)
        row = [f"`{name}`", field.description, *values, "; ".join(reasons)]
        lines.append(f"| {' | '.join(row)} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name} written")
