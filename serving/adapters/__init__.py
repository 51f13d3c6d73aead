"""A version's life on a replica: its files (`versions`), its place in the engine (`residency`, `resolver`), and what a
restarted replica loads first (`workingset`).
"""
