"""Data sets as examples by index: one file for each kind, the protocol they share, and the function that opens one."""
