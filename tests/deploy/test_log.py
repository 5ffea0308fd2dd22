from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from splitserve.cluster.log import JsonFormatter, log_path, merge, render, tail


def format_one(**extra: object) -> str:
    record = logging.makeLogRecord({"levelname": "WARNING", "msg": "lost %d of %s", "args": (2, "x"), **extra})
    return JsonFormatter("decode/0/1").format(record)


def test_a_line_is_one_json_object_with_its_request() -> None:
    entry = json.loads(format_one(request_id="r-7", engine="é"))
    assert entry["message"] == "lost 2 of x"
    assert entry["level"] == "WARNING"
    assert entry["worker"] == "decode/0/1"
    assert entry["request_id"] == "r-7"
    assert entry["engine"] == "é"
    assert entry["time"].endswith("+00:00")
    assert set(entry) == {"time", "level", "worker", "message", "request_id", "engine"}


def test_people_read_the_fields() -> None:
    text = render(format_one(request_id="r-7"))
    assert text.endswith("lost 2 of x  request_id=r-7")
    assert "WARNING decode/0/1" in text
    assert render("Segmentation fault") == "Segmentation fault"
    assert render("[1, 2]") == "[1, 2]"


def test_a_traceback_travels_in_its_line() -> None:
    try:
        raise ValueError("odd\nnews")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": (ValueError, error, error.__traceback__)})
    line = JsonFormatter("router/0").format(record)
    assert "\n" not in line
    assert "ValueError: odd" in render(line)


def test_tail_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "none.log", 5) == []


def test_merge_orders_by_time_and_keeps_plain_text_behind_its_entry() -> None:
    entries = [json.dumps({"time": f"2026-01-01T00:00:0{second}", "message": "m"}) for second in range(4)]
    merged = merge([[entries[0], "crash of 0", entries[3]], [entries[1], entries[2]]], 10)
    assert merged == [entries[0], "crash of 0", entries[1], entries[2], entries[3]]
    assert merge([[entries[0], entries[1]]], 1) == [entries[1]]


def test_output_of_a_crashing_process_lands_in_its_log(tmp_path: Path) -> None:
    code = (
        "import logging, os, sys; from pathlib import Path; from splitserve.cluster.log import start_logging\n"
        "start_logging(Path(sys.argv[1]), 'prefill/0/0', capture_output=True)\n"
        "logging.getLogger('x').info('hello'); print('printed', flush=True); os.abort()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode < 0
    lines = tail(log_path(tmp_path, "prefill/0/0"), 50)
    assert json.loads(lines[0])["message"] == "hello"
    assert lines[1] == "printed"
    assert "Fatal Python error: Aborted" in lines
    assert result.stdout == ""
