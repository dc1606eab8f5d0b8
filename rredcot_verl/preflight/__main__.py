"""`python -m rredcot_verl.preflight ARGUMENTS`: the arguments of `verl.trainer.main_ppo`, checked and explained.

Composes the config, checks it and the data, and prints the effective settings and estimates of memory and probes.
Starts no Ray, reads no weights, needs no GPU. Exit code 1 on a fault.
"""

import os
import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Check a run and print what was found; the exit code."""
    # verl and transformers warn about what they lack on a machine without GPUs.
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rredcot_verl.preflight.findings import Findings
    from rredcot_verl.preflight.inspection import inspect, page

    try:
        found = inspect(arguments)
        findings, text = found.findings, page(found)
    except ValueError as error:
        findings = Findings()
        findings.fault(str(error))
        text = f"{findings.text()}\n\npreflight: not ready"
    sys.stdout.write(text + "\n")
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
