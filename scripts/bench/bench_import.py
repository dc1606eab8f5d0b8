"""What the plugin adds to `import verl`: pairs of fresh processes, with the plugin and with it switched off.

Owner: the core maintainers. Makes a line of docs/results/bench.md. Last run: 2026-11-28.

    python scripts/bench/bench_import.py [--pairs 15 --json OUT.json]

`VERL_USE_EXTERNAL_PLUGINS=none` is verl's own switch. Each pair runs in turn, so that both see the same machine.
"""

import os
import statistics
import subprocess
import sys
import time

from plumbing import parser, save


def import_seconds(plugins: str) -> float:
    """Seconds a fresh process takes for `import verl`, interpreter start included."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins}
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import verl"], env=environment, check=True, capture_output=True
    )
    return time.perf_counter() - started


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, pairs=15).parse_args()
    import_seconds("none")
    pairs = [(import_seconds("auto"), import_seconds("none")) for _ in range(options.pairs)]
    report = {
        "pairs": options.pairs,
        "seconds_with_plugin_median": statistics.median(with_plugin for with_plugin, _ in pairs),
        "seconds_without_plugin_median": statistics.median(without for _, without in pairs),
        "difference_median": statistics.median(a - b for a, b in pairs),
        "ratio_median": statistics.median(a / b for a, b in pairs),
        "ratio_lowest": min(a / b for a, b in pairs),
        "ratio_highest": max(a / b for a, b in pairs),
    }
    save(options.json, report)
    for name, value in report.items():
        sys.stdout.write(f"{name:32s} {value:.4f}\n")


if __name__ == "__main__":
    main()
