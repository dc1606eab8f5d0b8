"""What a run with another estimator gets of us."""

import subprocess
import sys

from tests import PATIENCE_S


def test_loading_verls_engine_registers_nothing_with_transformers():
    code = (
        "import sys, verl.workers.engine.fsdp.transformer_impl as engine\n"
        "assert 'rredcot_language_model' in engine.EngineRegistry._engines\n"
        "assert 'rredcot_verl.passes.shared_attention' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-2000:]
