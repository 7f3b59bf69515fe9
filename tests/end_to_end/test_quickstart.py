"""``make quickstart``, with few updates."""

import os
import subprocess
import sys
from pathlib import Path

from tests.commands import REPO


def test_quickstart(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [REPO / "examples" / "quickstart" / "quickstart.sh", tmp_path],
        env={**os.environ, "PATH": path, "UPDATES": "3"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0][1:-1]] == ["perplexity at k =", "1", "2", "4", "8", "16"]
    assert [row[1].strip() for row in table[2:5]] == ["hyperrouter", "smoe-dropout", "hyperrouter-elastic"]
    assert all(float(cell) > 1 for row in table[2:5] for cell in row[2:-1])
    assert f"wrote {tmp_path}/sweep/sweep.png" in done.stdout
