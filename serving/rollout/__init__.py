"""Which version a reference means here, and how the next one comes: warm flip, canary, and back again by itself.

`rollout` watches the registry; `deployment` and `canary` say who gets what; `trials` and `scoring` judge a candidate;
`webhook` tells others.
"""
