"""The README and the table of options say what the code says."""

import re
from pathlib import Path

from tests.option_table import PATH, option_table

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_every_option_is_listed_with_its_default_and_help():
    assert PATH.read_text(encoding="utf-8") == option_table(), "python -m tests.option_table writes it anew"


def test_python_example_runs():
    example = re.search(r"```python\n(.*?)\nlm = ", README, flags=re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert names["y"].shape == (3, 5, 64)
    assert names["routing"].expert_index.shape == (15, 8)
