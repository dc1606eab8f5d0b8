# outcome: timed_out
"""Never ends and uses no processor time."""

import time

time.sleep(600)
