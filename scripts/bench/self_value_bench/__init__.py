"""Parts of `scripts/bench/bench_self_value.py`: the work, the ways to do it, the clock, the figures, the chart."""
