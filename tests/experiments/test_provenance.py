import subprocess

import pytest
import torch

from fairseq_hyperrouter.experiments import provenance as module
from fairseq_hyperrouter.experiments.provenance import provenance


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in a folder of which git knows nothing yet."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(module, "PACKAGE", folder)
    return folder


def git(folder, *arguments):
    who = ["-c", "user.name=somebody", "-c", "user.email=some@body"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


def commit_and_dirty():
    found = provenance(cpu=True)
    return found["commit"], found["dirty"]


def test_commit(package):
    """Of the package's own checkout: a change beside the package does not matter, a new file in it does."""
    assert commit_and_dirty() == (None, None)
    git(package.parent, "init")
    git(package.parent, "commit", "--allow-empty", "-m", "another project, in whose folder the package is installed")
    assert commit_and_dirty() == (None, None)
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "the package")
    head = git(package.parent, "rev-parse", "HEAD").strip()
    (package.parent / "notes.txt").touch()
    assert commit_and_dirty() == (head, False)
    (package / "more.py").touch()
    assert commit_and_dirty() == (head, True)


def test_without_git(package, monkeypatch):
    monkeypatch.setenv("PATH", str(package))
    assert commit_and_dirty() == (None, None)


@pytest.mark.parametrize("cpu", [True, False])
def test_machine(monkeypatch, cpu):
    """With --cpu a GPU that is there is not what trains."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = provenance(cpu)
    assert (found["machine"] == "a GPU") == (not cpu) and found["cpu"] == cpu
    assert found["torch"] == torch.__version__ and found["version"]
