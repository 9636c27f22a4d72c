"""Notebooks 06 and 07 with a chat file of one's own: what is open is not judged by exact match, and
what needs the kit's own questions is asked of the kit's own adapter.
"""

from __future__ import annotations

import json

import pytest

from qlora_nb.batch import sequence

PLACES = ("park", "river", "market", "school", "garden")


@pytest.mark.slow
def test_fine_tuning_and_inference_on_a_chat_file(tmp_path):
    rows = []
    for number in range(30):
        place = PLACES[number % len(PLACES)]
        turns = [
            {"role": "user", "content": f"Where is Anna on day {number}?"},
            {"role": "assistant", "content": f"Anna is at the {place}."},
            {"role": "user", "content": "And Ben?"},
            {"role": "assistant", "content": f"Ben left the {place}."},
        ]
        rows.append(json.dumps({"messages": turns}))
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(rows))
    given = {"dataset": str(data), "max_steps": 4, "eval_rows": 6, "output_dir": str(tmp_path)}
    summary = sequence.run_sequence(given, only=["06", "07"])
    problems = [outcome["problems"] for outcome in summary["notebooks"]]
    assert problems == [[], []]
    trained, asked = (outcome["results"] for outcome in summary["notebooks"])
    assert trained["held-out loss fell"] is True
    assert trained["baselines at most 20 %"] == "open answers"
    for found in (trained, asked):
        assert found["tuned answers at least 80 %"] == "open answers"
    assert asked["at strength 0 it is the base: all facts, no answer"] is True
    said = (tmp_path / "tiny" / summary["folder"]).glob("07_*.ipynb")
    assert "this adapter was trained with prompt_template=chat" in next(said).read_text()
