"""The CPU backend with weight sync cut off; for `VERL_USE_EXTERNAL_MODULES`."""

import wrapt

import tests.cpu.backend_plugin  # noqa: F401  (first, so that its entry is the one replaced)
from rredcot_verl.cpu import ROLLOUT_NAME


@wrapt.when_imported("verl.workers.rollout.base")
def _cut_off(rollout_base):
    rollout_base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "tests.cpu.cut_off_adapter.CutOffAdapter"
