"""A killed training goes on as if nothing had happened, to the last bit."""

import random
import shutil
import signal
import time

import pytest

from tests.commands import differing_tensors, load, popen, run, train, train_arguments

UPDATES = 40
BATCH = {"linear": 16, "elastic": 32}  # 53 updates make an epoch, or 27
KILLS = {"linear": ((3, 12), (18, 32)), "elastic": ((3, 12), (29, 33))}  # all in the first epoch, or not
SCHEDULES = tuple(BATCH)


def options(schedule):
    return [
        *("--moe-top-k-schedule", schedule, "--moe-top-k", "8", "--max-update", UPDATES),
        *("--dropout", "0.1", "--attention-dropout", "0.1", "--activation-dropout", "0.1"),
        *("--moe-gate-loss-wt", "0.01", "--moe-z-loss-wt", "0.001"),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10"),
        *("--save-interval-updates", "1", "--keep-interval-updates", "2", "--no-epoch-checkpoints"),
    ]


@pytest.fixture(scope="session")
def uninterrupted(once, data):
    def uninterrupted(schedule):
        def make(folder):
            entries = train(data, folder, *options(schedule), batch_size=BATCH[schedule]).logged("train_inner")
            return [entry["moe_top_k"] for entry in entries]

        return once(f"uninterrupted-{schedule}", make)

    return uninterrupted


def kill_after(update, data, folder, schedule):
    """SIGKILL a training at a random moment after the checkpoint of *update* has appeared."""
    process = popen(
        "fairseq-train", *train_arguments(data, folder, *options(schedule), batch_size=BATCH[schedule]), stdout=-3
    )
    deadline = time.monotonic() + 120
    try:
        while newest_update(folder) < update:
            assert process.poll() is None and time.monotonic() < deadline, f"ended before update {update}"
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
    finally:
        process.kill()
        process.wait()


def newest_update(folder):
    return max((int(path.stem.rpartition("_")[2]) for path in folder.glob("checkpoint_*_*.pt")), default=0)


def differences(first, second):
    """Where two final checkpoints differ: in weights, moments, learning rate or place in the data."""
    found = []
    for part in ("model", "last_optimizer_state"):
        found += differing_tensors(first[part], second[part], part)
    for path in (("extra_state", "train_iterator"), ("optimizer_history", -1, "num_updates")):
        a, b = first, second
        for key in path:
            a, b = a[key], b[key]
        found += differing_tensors(a, b, str(path))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_in_a_real_training(uninterrupted, schedule):
    top_k = uninterrupted(schedule)[1]
    assert len(top_k) == UPDATES
    if schedule == "linear":
        assert top_k == sorted(top_k) and (top_k[0], top_k[-1]) == (1, 8) and set(top_k) == set(range(1, 9))
    else:  # the mean of two layers' draws from 1 to 8
        assert min(top_k) >= 1 and max(top_k) <= 8 and len(set(top_k)) > 5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_twice_and_resumed(tmp_path, data, uninterrupted, schedule):
    whole = load(uninterrupted(schedule)[0] / "checkpoint_last.pt")
    kills = [random.randint(*bounds) for bounds in KILLS[schedule]]
    for update in kills:
        kill_after(update, data, tmp_path, schedule)
    killed_at = newest_update(tmp_path)
    assert killed_at < UPDATES, "too late to prove anything"
    log = train(data, tmp_path, *options(schedule), batch_size=BATCH[schedule]).log
    assert "Loaded checkpoint" in log
    assert differences(whole, load(tmp_path / "checkpoint_last.pt")) == [], f"killed at {kills}, {killed_at}"


def test_truncated_last_checkpoint(tmp_path, data, uninterrupted):
    """Stock fairseq does not copy to checkpoint_last.pt atomically: a kill can leave half of it."""
    whole = uninterrupted("linear")[0]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (newest,) = tmp_path.glob(f"checkpoint_*_{UPDATES}.pt")
    newest.unlink()
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    log = train(data, tmp_path, *options("linear"), batch_size=BATCH["linear"]).log
    assert f"{last} is truncated" in log
    assert differences(load(whole / "checkpoint_last.pt"), load(last)) == []


def test_interrupted_by_the_keyboard(tmp_path, data):
    """Ctrl-C on a training that has just begun leaves nothing that stops the next one."""
    process = popen(
        "fairseq-train",
        *train_arguments(data, tmp_path, *options("linear"), batch_size=BATCH["linear"]),
        stdout=-3,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while newest_update(tmp_path) < 1:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(2)
    process.wait(timeout=60)
    assert process.returncode != 0
    run("fairseq-train", *train_arguments(data, tmp_path, *options("linear"), "--max-update", "12", batch_size=16))
