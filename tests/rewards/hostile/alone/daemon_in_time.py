# limits: {"max_processes": 16, "max_threads": 24}
# outcome: timed_out
"""As `daemon`, and never ends: everything has to go when the time is over."""

import os
import time

for _ in range(8):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(600)
        os._exit(0)
time.sleep(600)
