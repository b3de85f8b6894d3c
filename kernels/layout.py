"""The tables of a plan and of its rows, as every kernel reads them."""

ROW, FIRST_ADDRESS = 0, 1  # leaves: the row of its counters, then the addresses of each column (`Storage.columns`)
LEAF, START, COUNT = 0, 1, 2  # tiles
# Counters: updates made, the last step that the row was part of (in the optimizer's own row: steps made), steps
# skipped, and whether the present step goes ahead.
T, CLOCK, SKIPPED, GO = 0, 1, 2, 3
COUNTERS = 4
# Advance: what a step adds to T of each row; whether the row is part of the step, frozen or not; and, if it is not
# updated, what is still done for it.
STEPS, TICKS, ASIDE = 0, 1, 2
ADVANCES = 3
DECIDES, SHARES_ALL, SHARES_GROUP = 1, 2, 4  # `decide`; state shared by all rows of a model, or of a group
SHARED = {"all": SHARES_ALL, "group": SHARES_GROUP}
