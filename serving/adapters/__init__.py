"""A version's life on a replica: its files (`versions`), its place in the engine (`residency`, `resolver`), what a
restarted replica loads first (`workingset`), and what is copied before anybody asks (`prefetch`).
"""
