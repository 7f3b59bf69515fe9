"""The example of docs/adding_a_router.md is a user directory that trains."""

import re

from tests.commands import REPO, sweep, train_arguments

EXAMPLE = (REPO / "docs" / "adding_a_router.md").read_text(encoding="utf-8")


def test_a_router_of_your_own(preloaded, data, tmp_path):
    code = re.search(r"```python\n(.*?)```", EXAMPLE, flags=re.DOTALL)[1]
    assert len(code.splitlines()) < 50
    package = tmp_path / "my_routers"
    package.mkdir()
    (package / "__init__.py").write_text("import fairseq_hyperrouter\n" + code)
    arguments = train_arguments(data, tmp_path / "checkpoints", "--moe-router", "distance", "--max-update", "3")
    result = preloaded.run("fairseq-train", *arguments, "--user-dir", package)
    assert result.code == 0, result.log[-3000:]
    assert len(result.losses()) == 3 and result.losses()[-1] < result.losses()[0]
    where = ["--user-dir", package, "--top-k", "1,8", "--out", tmp_path / "sweep"]
    swept = sweep(tmp_path / "checkpoints" / "checkpoint_last.pt", data, *where)
    assert "sweep.md" in swept.out
