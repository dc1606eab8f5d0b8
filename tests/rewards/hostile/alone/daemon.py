# limits: {"max_processes": 16, "max_threads": 24}
# outcome: held
"""Leaves a process behind that has a session of its own, two forks away, and ends well itself."""

import os
import signal
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    os._exit(0)
os.wait()
print("held")
