# outcome: held
"""Looks for open files, and writes to every one it could have been left."""

import os

open_files = []
for file in range(3, 1024):
    try:
        os.write(file, b'{"exit": 0, "timed_out": false, "cancelled": false}\n')
        open_files.append(file)
    except OSError as error:
        if error.errno != 9:
            open_files.append(file)
print("escaped" if open_files else "held", *open_files)
