"""Random input, and whether what came of it is what fastlr promises: `python -m tests.fuzz --minutes 5`.

Each module makes one kind of input, and knows what may come of it:

    arguments.py   odd arguments: an error with everything as it was, or what an ordinary value would have done
    files.py       damaged state files and state dicts: the same, no code is run, no more memory taken than needed
    interrupts.py  an exception at any line: what was before, or what comes after
    threads.py     calls from several threads: one after the other, or refused
    reentry.py     calls from inside a call: refused, and nothing has changed

An input is known by its kind, the seed and its index, and is the same in every run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the table of optimizers is in the folder of the tests
