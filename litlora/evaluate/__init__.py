"""What a model can do, in figures.

likelihood.py  the probability that a model gives to known tokens
subject.py     the model that is measured, and how it is asked
measures.py    loss, exact match, multiple choice
choices.py     records of multiple choice
results.py     evaluation.json
harness.py     a model as lm-evaluation-harness asks it
"""
