"""The data-parallel backends for GPUs, with a stand-in for CUDA: the weights are those of legacy_ddp."""

import pytest

from tests.commands import differing_tensors, eval_arguments, load, train_arguments

OPTIONS = ["--seed", "1", "--moe-loss-free-rate", "0.01", "--clip-norm", "0", "--moe-log-layers"]
OPTIONS += ["--optimizer", "sgd", "--lr", "0.5", "--momentum", "0.9"]
WRAPPED = ["--min-params-to-wrap", "1000"]  # every layer is sharded by itself


@pytest.mark.parametrize(
    "backend, more",
    [
        ("pytorch_ddp", ["--moe-router", "hyperrouter"]),
        ("pytorch_ddp", ["--moe-router", "recurrent"]),
        ("pytorch_ddp", ["--moe-router", "smoe", "--moe-expert-parallel-size", "2"]),
        ("fully_sharded", ["--moe-router", "hyperrouter", *WRAPPED]),
        ("fully_sharded", ["--moe-router", "smoe", *WRAPPED, "--checkpoint-activations"]),
        ("fully_sharded", ["--moe-router", "smoe", "--moe-top-k", "8", "--moe-top-k-schedule", "elastic"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[1::2]),
)
def test_weights_are_those_of_legacy_ddp(preloaded, data, tmp_path, backend, more):
    """Bit for bit, gradient norms and what is logged of layers too, over a save and a resume; and it evaluates."""
    norms, validated = [], []
    for folder, updates in (("legacy_ddp", 4), (backend, 2), (backend, 4)):
        options = [*OPTIONS, *more, "--max-update", updates, "--ddp-backend", folder]
        arguments = train_arguments(data, tmp_path / folder, *options, batch_size=4, validate=True)
        command = "fairseq-train" if folder == "legacy_ddp" else "-m tests.cuda_stand_in"
        results = preloaded.run_workers(2, command, *arguments)
        validated.append(results[0].logged("valid")[-1])
        norms.insert(0, [entry["gnorm"] for entry in results[0].logged("train_inner")])
    assert "Loaded checkpoint" in results[0].log
    states = [load(tmp_path / folder / "checkpoint_last.pt")["model"] for folder in (backend, "legacy_ddp")]
    assert not differing_tensors(*states)
    assert norms[0] == norms[2][-2:]
    layers = [{name: value for name, value in entry.items() if "_layer" in name} for entry in validated[::2]]
    assert "valid_moe_jacobian_rank_layer1" in layers[0] and layers[0] == layers[1]
    result = preloaded.run("fairseq-eval-lm", *eval_arguments(data, tmp_path / backend / "checkpoint_last.pt"))
    assert result.code == 0 and "Loss (base 2)" in result.log
