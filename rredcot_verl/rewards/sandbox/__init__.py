"""Running untrusted programs: a judge that trusts nothing they say, and the cell they are run in.

In the order of a run: `judge` (what to run and what counts as passed), `client` (the judge's side of a cell),
`fork_server` (a bare Python that forks cells), `cell` (limits, namespaces, killing), `program` and `checker` (what runs
inside).
"""
