"""Rows → tokens, and which of them are trained on.

tokenizer, templates     what writes a row
labels, ends             the assistant's turns and their ends, found from the template itself
marked                   many texts tokenised at once
kept, examples           those that fit, held in flat arrays; of preferences two answers a row
splits                   training and evaluation rows
"""
