"""The offline bench: which credit is right, on the user's own model and traces.

`command_line` reads the options, `bench` makes the traces (`trace_maker`) and measures what each estimator needs
(`measuring` and `measured_*`, kept by `store` as `records`); `estimators` turns the measurements into values by method
(`method_values`, `regressions`), `evaluate` compares them with Monte Carlo, and `page` and `tables` show the results.
"""
