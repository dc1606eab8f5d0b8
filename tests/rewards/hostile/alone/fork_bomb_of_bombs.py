# limits: {"max_processes": 16, "max_threads": 24}
# outcome: timed_out
"""Every child forks too, six generations at most (64 processes), and none ever ends by itself in time."""

import os
import time

for _ in range(6):
    try:
        os.fork()
    except OSError:
        break
time.sleep(600)
