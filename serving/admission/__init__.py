"""Whose request goes to the engine next: `fairness` is the rule, `admission` the queue, `lengths` what one may cost."""
