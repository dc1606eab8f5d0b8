"""What verl needs to drive vLLM on CPU, for `VERL_USE_EXTERNAL_MODULES` of test runs."""

import wrapt


@wrapt.when_imported("vllm._custom_ops")
def _no_packed_weights(custom_ops) -> None:
    # vLLM's oneDNN matrix products keep packed copies of the weights, which verl's weight update does not reach.
    custom_ops._supports_onednn = False
