# limits: {"max_processes": 16, "max_threads": 24}
# outcome: held
"""Forks until it is stopped; by itself after 64."""

import os
import time

num_children = 0
for _ in range(64):
    try:
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
    except OSError:
        break
    num_children += 1
print("escaped" if num_children >= 64 else "held")
