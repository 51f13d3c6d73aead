"""How good an adapter is: on rows of one's own, on lm-evaluation-harness tasks, and what must be reached to publish."""
