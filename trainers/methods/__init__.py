"""How an adapter is trained: supervised (`sft`, `packing`), from preferences with a reference or without."""
