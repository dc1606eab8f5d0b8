"""Regression of verified outcomes on what is known of a state, for `self_value.calibration=logistic` and `form=hidden`.

Torch only. The model is ours:

    v = sigmoid(o + x'b + c),    o = logit((s m + n g) / (s + n)),    b_j ~ N(0, tau^2)

x are the standardised columns of a state (`features`), g the mean outcome of the prompt's n other rollouts, m that of
all training rows. b and c maximise the penalised likelihood (`model`). s, and a tau for each block of columns (0: left
out), are those of a small grid that predict left-out training prompts best (`forecast`). `readout` says what is fitted
to: a run's earlier steps.
"""
