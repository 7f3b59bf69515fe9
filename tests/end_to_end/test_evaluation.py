"""Evaluation at any number of experts: fairseq-eval-lm, the sweep command, and the equations agree."""

import json
import re

import pytest
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from fairseq_hyperrouter import Routing, UserError
from fairseq_hyperrouter.analysis import evaluation
from fairseq_hyperrouter.analysis.evaluation import Evaluator
from tests import commands, reference
from tests.commands import EXPERTS, REPO, USER_DIR, load, loss_of, run, run_python, sweep, train

TRAINED_K = 2  # --moe-top-k's default, which the fixture's trainings keep
AT_SEVERAL_K = [("hyperrouter", None), ("hyperrouter", 1), ("hyperrouter", 5), ("smoe", EXPERTS), ("smoe-dropout", 1)]


def slow_loss(checkpoint, router, top_k):
    """The loss on the test split in bits, every MoE layer computed token by token and expert by expert."""
    state = load(checkpoint)
    cfg = OmegaConf.create(state["cfg"])
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model, from_checkpoint=True).eval()
    model.load_state_dict(state["model"])
    for number, layer in enumerate(model.decoder.layers):
        prefix = f"decoder.layers.{number}.moe."
        own = {n.removeprefix(prefix): t.double() for n, t in state["model"].items() if n.startswith(prefix)}

        def forward(x, *, own=own, padding_mask=None, **_):
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            found = reference.moe_layer(
                own, x.reshape(-1, x.size(-1)).double(), router=router, top_k=top_k, padding=mask
            )
            return found.y.view_as(x).to(x), Routing(found.logits, torch.tensor(found.chosen), torch.ones(1))

        layer.moe.forward = forward

    return loss_of(model, task)


@pytest.mark.parametrize(("router", "top_k"), AT_SEVERAL_K)
def test_eval_lm_computes_the_equations(trained, evaluated, router, top_k):
    folder, _ = trained(router)
    found = evaluated(router, top_k)
    in_force = TRAINED_K if top_k is None else top_k
    expected = slow_loss(folder / "checkpoint_last.pt", router, in_force)
    assert found["loss"] == pytest.approx(expected, abs=1e-4)
    assert f"at inference {in_force} of {EXPERTS}" in found["log"]


def test_k_changes_the_loss(evaluated):
    assert len({evaluated("hyperrouter", top_k)["loss"] for top_k in (None, 1, 5)}) == 3


def test_sweep_prints_what_eval_lm_prints(tmp_path, data, trained, evaluated):
    checkpoints = [trained(name)[0] / "checkpoint_last.pt" for name in ("hyperrouter", "smoe", "dense")]
    result = sweep(*checkpoints, data, "--top-k", f"1,5,{EXPERTS}", "--out", tmp_path / "out")

    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    found = {(row["label"], row["top_k"]): row for row in rows}
    assert list(found) == [(n, k) for n in ("hyperrouter", "smoe") for k in (1, 5, EXPERTS)] + [("dense", None)]
    for name, top_k in (("hyperrouter", 1), ("hyperrouter", 5), ("smoe", EXPERTS), ("dense", None)):
        stock = evaluated(name, top_k)
        row = found[name, top_k]
        assert f"{row['perplexity']:.2f}" == stock["printed_perplexity"]
        assert f"{row['bits_per_token']:.4f}" == f"{stock['loss']:.4f}"
        assert row["bits_per_character"] == pytest.approx(row["bits_per_token"])
        assert re.search(rf"\| +{name} \| +{top_k or 'dense'} \| +{stock['printed_perplexity']} \|", result.out)

    side_by_side = result.out.split("\n\n")[0]
    for row in rows:  # in the first table under the column of its k
        header, *lines = [[cell.strip() for cell in line.split("|")] for line in side_by_side.splitlines()]
        (line,) = [line for line in lines if line[1] == row["label"]]
        assert line[header.index(str(row["top_k"] or "dense"))] == f"{row['perplexity']:.2f}"
    assert result.out.startswith((tmp_path / "out" / "sweep.md").read_text())
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    wrote = re.findall(r"^wrote (.*)$", result.out, re.MULTILINE)
    assert wrote == [str(tmp_path / "out" / f"sweep.{kind}") for kind in ("json", "md", "png")]


def test_fresh_processes_agree_to_the_last_digit(tmp_path, data, trained):
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    bits = []
    for out in (tmp_path / "first", tmp_path / "second"):
        sweep(checkpoint, data, "--top-k", "1,3", "--out", out)
        bits.append([row["bits_per_token"] for row in json.loads((out / "sweep.json").read_text())])
    assert bits[0] == bits[1]


def test_checkpoints_hold_data_only(tmp_path, data, trained):
    """torch.load(weights_only=True) reads them where nobody imported the package, or fairseq."""
    names = ("hyperrouter", "smoe", "smoe-dropout", "dense")
    files = [path for name in names for path in sorted(trained(name)[0].glob("*.pt"))]
    assert len(files) >= len(names)
    train(data, tmp_path, "--optimizer", "sgd", "--max-update", "1")  # one of the argparse ones
    files += sorted(tmp_path.glob("*.pt"))
    run_python(
        "import sys, torch\n"
        "for path in sys.argv[1:]: torch.load(path, weights_only=True)\n"
        "assert not {'fairseq', 'fairseq_hyperrouter'} & set(sys.modules)\n",
        *files,
    )


def test_allocate_prints_what_evaluates_the_list(tmp_path, data, trained):
    """Also of a checkpoint that was trained to give a token one expert (top-p 0)."""
    state = load(trained("hyperrouter")[0] / "checkpoint_last.pt")
    state["cfg"]["model"]["moe_eval_top_p"] = 0.0
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save(state, checkpoint)
    ample = ["--choices", f"1,{EXPERTS}", "--budget", "1"]
    result = run("fairseq-hyperrouter", "allocate", checkpoint, data, *ample, "--out", tmp_path, "--cpu")
    overrides = re.search(r'--model-overrides "(.*)"', result.out)[1]
    assert f"'moe_eval_top_k': '{EXPERTS},{EXPERTS}'" in overrides
    row = next(row for row in json.loads((tmp_path / "allocate.json").read_text()) if row["top_k"] == EXPERTS)
    printed = commands.evaluate(data, checkpoint, options=["--model-overrides", overrides])["printed_perplexity"]
    assert printed == f"{row['perplexity']:.2f}"


def test_a_part_of_the_split(data, trained):
    """Every n-th batch: about as many tokens as are asked for, and with more than there are all of them."""
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"

    def at(tokens):
        return Evaluator(checkpoint, str(data), batch_size=1, cpu=True, tokens=tokens).at(2, show=False)

    whole = at(None)
    assert at(10**9)["perplexity"] == whole["perplexity"]
    part = at(whole["tokens"] // 3)
    assert 0.2 < part["tokens"] / whole["tokens"] < 0.5
    assert part["perplexity"] == pytest.approx(whole["perplexity"], rel=0.2)
    assert part["perplexity"] != whole["perplexity"]
    with pytest.raises(UserError, match="--tokens 0: must be at least 1"):
        at(0)


@pytest.mark.parametrize("cutoff", [[], ["--adaptive-softmax-cutoff", "10,30"]], ids=["plain", "adaptive"])
def test_probabilities_of_many_symbols_come_in_pieces(tmp_path, data, monkeypatch, cutoff):
    """And are those of the whole batch."""
    train(data, tmp_path, *cutoff, "--max-update", "1")

    def at(tokens):
        """Loss with so many *tokens* in a piece, and how many there were."""
        evaluator = Evaluator(tmp_path / "checkpoint_last.pt", str(data), batch_size=3, cpu=True)
        evaluator.softmax_batch = tokens
        sizes, plain = [], evaluator.model.get_normalized_probs

        def counted(output, **stock):
            sizes.append(output[0].shape[:2].numel())
            return plain(output, **stock)

        monkeypatch.setattr(evaluator.model, "get_normalized_probs", counted)
        return evaluator.at(2, show=False)["bits_per_token"], sizes

    (whole, all_at_once), (pieces, sizes) = at(0), at(50)
    assert max(all_at_once) == 3 * 64 and max(sizes) == 50 and sum(sizes) == sum(all_at_once)
    assert pieces == pytest.approx(whole, rel=1e-6)
    for room, piece in ((70, 70), (3, 64)):
        monkeypatch.setattr(evaluation, "SOFTMAX_BYTES", room * 4 * len(Dictionary.load(str(data / "dict.txt"))) + 1)
        assert Evaluator(tmp_path / "checkpoint_last.pt", str(data), cpu=True).softmax_batch == piece


def test_without_a_moe_layer(tmp_path, data):
    """A model of this architecture without experts is like a dense one."""
    train(data, tmp_path, "--moe-layers", "none", "--max-update", "1")
    sweep(tmp_path / "checkpoint_last.pt", data, "--out", tmp_path)
    (row,) = json.loads((tmp_path / "sweep.json").read_text())
    assert row["top_k"] is None and row["mean_top_k"] is None
    arguments = commands.eval_arguments(data, tmp_path / "checkpoint_last.pt", "--valid-top-k", "1,2")
    result = run("fairseq-validate", *arguments, check=False)
    assert result.code == 1 and result.last_line.endswith("--valid-top-k 1,2: this model has no experts")


def test_user_dir_prints_the_folder():
    assert run("-m fairseq_hyperrouter.commands", "user-dir", cwd=REPO).out == f"{USER_DIR}\n"


def test_a_list_of_k_and_limits(tmp_path, data, trained):
    """allocate's lists are what fairseq-eval-lm takes; a top-p of 1 is every expert, of 0 the best one.

    A threshold is the other way round.
    """
    checkpoint = trained("hyperrouter")[0] / "checkpoint_last.pt"
    out = ["--out", tmp_path, "--cpu"]
    run("fairseq-hyperrouter", "allocate", checkpoint, data, "--choices", f"1,{EXPERTS}", *out)
    rows = json.loads((tmp_path / "allocate.json").read_text())
    by_list = {tuple(row["top_k"]): row for row in rows if isinstance(row["top_k"], list)}
    assert len(by_list) == 3 and {(1, 1), (EXPERTS, EXPERTS)} < set(by_list)
    mixed = next(found for found in by_list if len(set(found)) > 1)
    printed = commands.evaluate(data, checkpoint, f"'{mixed[0]},{mixed[1]}'")
    assert printed["printed_perplexity"] == f"{by_list[mixed]['perplexity']:.2f}"
    assert commands.evaluate(data, checkpoint, list(mixed))["printed_perplexity"] == printed["printed_perplexity"]
    by_k = {row["top_k"]: row for row in rows if isinstance(row["top_k"], int)}
    assert by_k[1]["flops_per_token"] < by_list[mixed]["flops_per_token"] < by_k[EXPERTS]["flops_per_token"]

    limits = ["--top-p", "0,0.5,1", "--threshold", f"1,{1 / EXPERTS},0"]
    sweep(checkpoint, data, "--top-k", f"1,{EXPERTS}", *limits, "--out", tmp_path)
    best, every, *limited = json.loads((tmp_path / "sweep.json").read_text())
    for name, values, rows in (
        ("top_p", [0, 0.5, 1], limited[:3]),
        ("threshold", [1, 1 / EXPERTS, 0], limited[3:]),
    ):
        assert [row[name] for row in rows] == values
        assert rows[0]["perplexity"] == pytest.approx(best["perplexity"], rel=1e-6) and rows[0]["mean_top_k"] == 1
        assert rows[2]["perplexity"] == pytest.approx(every["perplexity"], rel=1e-6)
        assert 1 < rows[1]["mean_top_k"] < EXPERTS
        assert best["flops_per_token"] < rows[1]["flops_per_token"] < every["flops_per_token"]
        override = {"moe_eval_top_k": EXPERTS, f"moe_eval_{name}": values[1]}
        printed = commands.evaluate(data, checkpoint, options=["--model-overrides", str(override)])
        assert printed["printed_perplexity"] == f"{rows[1]['perplexity']:.2f}"
