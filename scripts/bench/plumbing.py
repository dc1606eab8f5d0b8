"""What the benchmarks share: options and the file of figures."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any


def parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A command line with whole-number options and `--json`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


def machine() -> str:
    """What the figures were taken on."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def save(path: Path | None, figures: Any) -> None:
    """Write figures as JSON, if a file is asked for."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
