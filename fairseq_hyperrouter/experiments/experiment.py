"""What an experiment is: a file that names its runs, the options of each, and where it is evaluated.

    title: What the table is about
    metric: perplexity              # or bits_per_character
    at: [1, 2, 4, 8, 16]            # experts per token at inference
    logged: [train_wps]             # more columns, from what the trainings logged last
    checkpoint: last                # or best: which one is evaluated
    evaluation: {tokens-per-sample: 128, split: test}   # batch-size, context-window; else as in training
    options: {task: hyperrouter, lr: 0.001, share-decoder-input-output-embed: true, ...}
    runs:
      SMoE: {moe-router: smoe}
      HyperRouter, k = 1: {moe-router: hyperrouter, moe-top-k: 1, row: specialists, at: [1]}
    settings:
      words: {data: data-bin/wikitext-2, seeds: [1, 2, 3], options: {max-update: 2000}}
      bytes: {data: data-bin/enwik8, metric: bits_per_character}

Options are those of fairseq-train without their dashes: ``true`` gives a flag, ``null`` or ``false`` takes one of the
shared ones away. A run's go before a setting's, and those before the shared ones. Runs of one ``row`` fill one row of
the table together, each at an ``at`` that no other of them has. ``based_on: other.yaml`` takes all but the runs from
that file, beside this one, and this one says what is more or different.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import yaml

from fairseq_hyperrouter.errors import UserError

METRICS = ("perplexity", "bits_per_character", "bits_per_token")
_SAVES_NO = {"last": "no-last-checkpoints", "best": "disable-validation"}
CHECKPOINTS = tuple(_SAVES_NO)
_FILE = {"title", "based_on", "metric", "at", "logged", "options", "runs", "settings", "evaluation", "checkpoint"}
_SETTING = {"data", "seeds", "options", "evaluation", "metric"}
_GIVEN = {"save-dir", "seed", "user-dir", "log-format", "log-file"}
"""Options of fairseq-train that the runner gives itself."""
_EVALUATION = {"split": None, "batch-size": 1, "tokens-per-sample": 1, "context-window": 0}
"""Options of the sweep that it does not, and the least that those can be that are numbers."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    name: str
    row: str
    seed: int
    at: Tuple[int, ...]
    options: Tuple[str, ...]
    """Arguments of fairseq-train."""
    updates: int

    @property
    def folder(self) -> str:
        """A name for its folder."""
        return f"{re.sub(r'[^a-z0-9.]+', '-', self.name.lower()).strip('-')}-seed{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """The runs of one setting, and how their results are shown."""

    title: str
    setting: str
    metric: str
    logged: Tuple[str, ...]
    checkpoint: str
    data: Optional[str]
    evaluation: Tuple[str, ...]
    """Arguments of ``fairseq-hyperrouter sweep``."""
    runs: Tuple[Run, ...]
    split: str = "test"
    """Where they are evaluated."""

    @property
    def rows(self) -> Tuple[str, ...]:
        """Of its table, from the first to the last."""
        return tuple(dict.fromkeys(run.row for run in self.runs))

    def only(self, rows: Sequence[str]) -> "Experiment":
        """What it is without the runs of other *rows*."""
        return replace(self, runs=tuple(run for run in self.runs if run.row in rows))


def read_experiment(path: Path, setting: Optional[str] = None, seeds: Optional[Sequence[int]] = None) -> Experiment:
    """Read and check the file; *setting* by default its only or first one, *seeds* those of the setting.

    Raises:
        UserError (a ValueError): naming file, place and what is allowed.
    """
    content = read_content(path)
    _check_keys(path, "", content, _FILE, needed=("title", "runs", "settings"))
    settings = _some(path, "settings", content["settings"])
    setting = next(iter(settings)) if setting is None else setting
    if setting not in settings:
        raise UserError(f"--setting {setting}: {path} has {', '.join(map(str, settings))}")
    chosen = settings[setting] or {}
    _check_keys(path, f"settings: {setting}", chosen, _SETTING)
    if not isinstance(chosen.get("data", ""), str):
        raise UserError(f"{path}: settings: {setting}: data {chosen['data']}: must be a folder's name")
    metric = chosen.get("metric", content.get("metric", METRICS[0]))
    checkpoint = content.get("checkpoint", CHECKPOINTS[0])
    for key, value, allowed in (("metric", metric, METRICS), ("checkpoint", checkpoint, CHECKPOINTS)):
        if value not in allowed:
            raise UserError(f"{path}: {key} {value}: choose from {', '.join(allowed)}")
    logged = content.get("logged", [])
    if not isinstance(logged, list) or not all(isinstance(name, str) for name in logged):
        raise UserError(f"{path}: logged {logged}: must be a list of names, as in [train_wps]")
    shared = {**_options(path, "options", content), **_options(path, f"settings: {setting}", chosen)}
    top_k = _numbers(path, "at", content.get("at", [1, 2, 4, 8, 16]), least=1)
    seeds = _numbers(path, "seeds", chosen.get("seeds", [1])) if seeds is None else _numbers(path, "--seeds", [*seeds])
    evaluation = _evaluation(path, {"evaluation": content, f"settings: {setting}: evaluation": chosen})
    runs: List[Run] = []
    for name, own in _some(path, "runs", content["runs"]).items():
        own = dict(_mapping(path, f"runs: {name}", own or {}))
        row = _text(path, f"runs: {name}: row", own.pop("row", str(name)))
        at = _numbers(path, f"runs: {name}: at", own.pop("at", list(top_k)), least=1)
        options = {**shared, **_checked(path, f"runs: {name}", own)}
        _check_training(path, str(name), options, checkpoint)
        runs += [Run(str(name), row, seed, at, as_arguments(options), options["max-update"]) for seed in seeds]
    _check_distinct(path, runs)
    return Experiment(
        _text(path, "title", content["title"]),
        str(setting),
        metric,
        tuple(logged),
        checkpoint,
        chosen.get("data"),
        as_arguments(evaluation),
        tuple(runs),
        str(evaluation.get("split") or Experiment.split),
    )


def read_content(path: Path) -> Dict[str, Any]:
    """What the file says, with what it takes from another.

    Raises:
        UserError (a ValueError): a file that is missing or no YAML, an entry that does not exist.
    """
    content = _load(path)
    if "based_on" not in content:
        return content
    base = _load(path.parent / str(content["based_on"]))
    if "based_on" in base:
        raise UserError(f"{path}: based_on {content['based_on']}: is itself based on another, name that one")
    base.pop("runs", None)
    return _merged(base, content)


class _Loader(yaml.SafeLoader):
    """YAML's, which takes the last of two values of one name without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"FILE {path}: {error.strerror.lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"FILE {path}: is no YAML: {' '.join(str(error).split())}") from None
    _check_keys(path, "", content, _FILE)
    return content


def _merged(base: Dict[str, Any], own: Dict[str, Any]) -> Dict[str, Any]:
    """*base* with what *own* adds and changes, at every depth."""
    merged = {**base, **own}
    for key in base.keys() & own.keys():
        if isinstance(base[key], dict) and isinstance(own[key], (dict, type(None))):
            merged[key] = _merged(base[key], own[key] or {})
    return merged


def as_arguments(options: Mapping[str, Any]) -> Tuple[str, ...]:
    """{"lr": 0.1, "cpu": True, "bf16": None} -> ("--lr", "0.1", "--cpu")"""
    arguments: List[str] = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments += [f"--{name}", str(value)]
    return tuple(arguments)


def _options(path: Path, place: str, part: Mapping[str, Any]) -> Mapping[str, Any]:
    return _checked(path, place, part.get("options") or {})


def _checked(path: Path, place: str, options: Any) -> Mapping[str, Any]:
    checked: Dict[str, Any] = {}
    for written, value in _mapping(path, place, options).items():
        name = str(written).replace("_", "-")
        if name in _GIVEN:
            raise UserError(f"{path}: {place}: {written}: is the runner's to give, leave it out")
        if name in checked:
            raise UserError(f"{path}: {place}: {written}: is there twice")
        if isinstance(value, (dict, list)):
            raise UserError(f"{path}: {place}: {written}: must be one value, as in the command line")
        checked[name] = value
    return checked


def _mapping(path: Path, place: str, value: Any) -> Dict[str, Any]:
    if not isinstance(value, dict):
        place = f"{place}: " if place else ""
        raise UserError(f"{path}: {place}must be names with values, as in a: 1")
    return value


def _some(path: Path, place: str, value: Any) -> Dict[str, Any]:
    if not _mapping(path, place, value):
        raise UserError(f"{path}: {place}: names none")
    return value


def _evaluation(path: Path, parts: Mapping[str, Mapping[str, Any]]) -> Dict[str, Any]:
    """What the *parts* of the file, by the place of each, say together of how runs are evaluated."""
    evaluation: Dict[str, Any] = {}
    for place, part in parts.items():
        own = _checked(path, place, part.get("evaluation") or {})
        _check_keys(path, place, own, _EVALUATION)
        for key, value in own.items():
            least = _EVALUATION[key]
            if value is None:  # takes away what the parts before said
                continue
            if least is None:
                _text(path, f"{place}: {key}", value)
            elif type(value) is not int or value < least:
                raise UserError(f"{path}: {place}: {key} {value}: must be a whole number, at least {least}")
        evaluation.update(own)
    return evaluation


def _check_training(path: Path, name: str, options: Mapping[str, Any], checkpoint: str) -> None:
    """That it ends, and saves what is evaluated."""
    updates = options.get("max-update")
    if not isinstance(updates, int) or updates < 1:
        raise UserError(f"{path}: runs: {name}: max-update {updates}: must be a number of updates")
    for never in ("no-save", _SAVES_NO[checkpoint]):
        if options.get(never):
            raise UserError(f"{path}: runs: {name}: {never}: saves no checkpoint_{checkpoint}.pt to evaluate")


def _check_distinct(path: Path, runs: Sequence[Run]) -> None:
    """That no two runs would be written to the same folder, or counted as two seeds of one."""
    folders: Dict[str, Run] = {}
    cells: Dict[Tuple[str, int, int], Run] = {}
    for run in runs:
        other = folders.setdefault(run.folder, run)
        if other is not run:
            raise UserError(f"{path}: runs: {run.name}: {other.name} has the same folder, {run.folder}, rename one")
        for k in run.at:
            other = cells.setdefault((run.row, run.seed, k), run)
            if other is not run:
                raise UserError(
                    f"{path}: runs: {run.name}: row {run.row} has k = {k} of {other.name} already, give both an at of "
                    "their own"
                )


def _text(path: Path, place: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: {place} {value}: must be a text")
    return value


def _numbers(path: Path, place: str, value: Any, least: int = 0) -> Tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= least for item in value):
        raise UserError(f"{path}: {place} {value}: must be a list of whole numbers from {least} on, as in [1, 2]")
    if len(set(value)) < len(value):
        raise UserError(f"{path}: {place} {value}: names a number twice")
    return tuple(value)


def _check_keys(path: Path, place: str, value: Any, known: Any, needed: Sequence[str] = ()) -> None:
    value, place = _mapping(path, place, value), f"{place}: " if place else ""
    for key in value:
        if key not in known:
            raise UserError(f"{path}: {place}{key}: no such entry, choose from {', '.join(sorted(known))}")
    for key in needed:
        if key not in value:
            raise UserError(f"{path}: {place}{key}: is missing")
