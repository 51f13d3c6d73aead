"""Rows → tokens, and which of them are trained on.

tokenizer, templates     what writes a row
labels, ends             the assistant's turns and their ends, found from the template itself
compared                 the same for two answers to one prompt
splits, examples         training and evaluation rows, held in flat arrays
"""
