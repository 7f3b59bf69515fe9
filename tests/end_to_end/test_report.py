"""``fairseq-hyperrouter report``: its numbers against the model's own, its page in a browser."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from fairseq import checkpoint_utils

from tests import reference
from tests.commands import EXPERTS, run

TOP_K = 2


@pytest.fixture(scope="module")
def reported(data, trained, tmp_path_factory):
    """The folder and what was printed, of two checkpoints."""
    out = tmp_path_factory.mktemp("report")
    checkpoints = [trained(router)[0] / "checkpoint_last.pt" for router in ("hyperrouter", "smoe")]
    options = ["--data", data, "--top-k", f"1,{EXPERTS}", "--look-at", TOP_K, "--out", out, "--cpu"]
    return out, run("fairseq-hyperrouter", "report", *checkpoints, *options)


def test_files(reported):
    out, result = reported
    names = ["report.json", "loss.png", "layers.png", "load.png", "similarity0.png", "similarity1.png", "report.html"]
    assert re.findall(r"^wrote (.*)$", result.out, flags=re.MULTILINE) == [str(out / name) for name in names]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    assert "router entropy, nats" in result.out


def test_numbers(reported, data, trained):
    """Entropy, load and outer balance of the whole test split, by the equations, from what the model returns."""
    content = json.loads((reported[0] / "report.json").read_text())
    assert [[row["top_k"] for row in one["sweep"]] for one in content["checkpoints"]] == [[1, EXPERTS]] * 2
    path = str(trained("smoe")[0] / "checkpoint_last.pt")
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path], {"task": {"data": str(data)}})
    task.load_dataset("test")
    model.eval()
    logits, chosen, tokens = [], [], []
    with model.at_top_k(TOP_K), torch.no_grad():
        for batch in task.eval_lm_dataloader(task.dataset("test"), batch_size=8, num_workers=0):
            routing = model(**batch["net_input"])[1]["routing"][0]
            real = batch["net_input"]["src_tokens"].t().reshape(-1) != 1
            logits.append(routing.logits[real].double())
            chosen.append(routing.expert_index[real])
            tokens.append(batch["net_input"]["src_tokens"].t().reshape(-1)[real])
    logits, chosen, tokens = torch.cat(logits), torch.cat(chosen), torch.cat(tokens)
    layer = content["checkpoints"][1]["layers"][0]
    expected = reference.entropy(logits, chosen.tolist(), torch.zeros(len(logits), dtype=torch.bool)).item()
    assert layer["router_entropy"] == pytest.approx(expected, rel=1e-5)
    assert layer["normalised_entropy"] == pytest.approx(expected / math.log(EXPERTS), rel=1e-5)
    load = torch.bincount(chosen.reshape(-1), minlength=EXPERTS) / chosen.numel()
    assert layer["load"] == pytest.approx(load.tolist())
    assert layer["mean_top_k"] == TOP_K and sum(layer["load"]) == pytest.approx(1)
    mass = torch.stack([p[index].sum() for p, index in zip(logits.softmax(-1), chosen)]).mean()
    assert layer["outer_balance"] == pytest.approx(mass.item(), rel=1e-5)
    assert len(content["changed"]) == 1 and all(0 < share <= 1 for share in content["changed"][0]["share"])
    assert 1 <= layer["jacobian_rank"] <= TOP_K - 1 and layer["jacobian_span"] <= EXPERTS
    assert [row[number] for number, row in enumerate(layer["output_similarity"])] == pytest.approx([1] * EXPERTS)
    for expert, top in enumerate(layer["top_tokens"]):
        for one in top:
            has = (tokens == task.dictionary.index(one["token"])) & (chosen == expert).any(1)
            assert one["count"] == has.sum()


def test_the_page_has_every_number(reported):
    """Loss and cost at every k; of every layer entropy, balances, load, similarities, ranks; changed experts."""
    page = (reported[0] / "report.html").read_text(encoding="utf-8")
    tables = [
        [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", html.unescape(row)) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        for table in re.findall(r"<table>(.*?)</table>", page, flags=re.DOTALL)
    ]
    losses, changed, *of_models = tables
    cost = [f"{which} parameters" for which in ("total", "trained", "frozen", "active")]
    assert losses[0] == ["model", "k", "perplexity", "bits per character", *cost, "MFLOPs per token"]
    assert [row[:2] for row in losses[1:]] == [
        [name, k] for name in ("hyperrouter", "smoe") for k in ("1", str(EXPERTS))
    ]
    assert all(float(cell.replace(",", "")) >= 0 for row in losses[1:] for cell in row[2:])
    assert changed[0] == ["first", "second", "layer 0", "layer 1"] and changed[1][:2] == ["hyperrouter", "smoe"]
    entropies = ["router entropy, nats", "entropy / ln E", "p1 / p2", "mass of the chosen", "margin"]
    loads = ["load imbalance", "load CV", "unused"]
    collapse = ["output CKA", "weight cosine", "rank of inputs", "rank of J's routing term", "span over tokens"]
    for numbers in (of_models[0], of_models[3]):
        assert [row[0] for row in numbers] == ["layer", *entropies, *loads, *collapse]
        assert all(math.isfinite(float(cell)) for row in numbers for cell in row[1:])
    for tokens in (*of_models[1:3], *of_models[4:]):
        assert tokens[0] == ["expert", "load", "takes more of these than its share"] and len(tokens) == 1 + EXPERTS
    meanings = page[page.index("What the numbers mean") :]
    assert "MaxVio" in meanings and "geometric mean" in meanings
    assert [alt in page for alt in ("against FLOPs", "ranks per layer", "load of every expert")] == [True] * 3


def test_page_in_a_browser(reported, tmp_path):
    """Self-contained: a browser shows every picture from this one file, in another place."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a browser: apt-get install chromium")
    page = (reported[0] / "report.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"base64,[^']*", "", page)
    script = (
        "<script>window.onload = () => { const all = [...document.images];"
        "document.title = `${all.length} pictures, ${all.filter(i => i.naturalWidth > 99).length} shown,"
        " ${document.querySelectorAll('table').length} tables`; }</script></body>"
    )
    copy = tmp_path / "page.html"
    copy.write_text(page.replace("</body>", script), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000"]
    done = subprocess.run([browser, *flags, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>5 pictures, 5 shown, 8 tables</title>" in done.stdout, done.stdout[:500] + done.stderr[-2000:]


def test_mistakes(reported, data, trained, tmp_path):
    checkpoint = trained("smoe")[0] / "checkpoint_last.pt"
    for options, message in (
        (
            ["--top-k", "1", "--look-at", EXPERTS + 1],
            f"--look-at {EXPERTS + 1}: must be an integer between 1",
        ),
        (["--top-k", "one"], "--top-k 'one': must be integers"),
        (["--top-k", "1", "--split", "tset"], "tset"),
    ):
        result = run("fairseq-hyperrouter", "report", checkpoint, "--data", data, *options, "--cpu", check=False)
        assert result.code == 1 and message in result.last_line and "Traceback" not in result.log, result.log[-800:]
