"""Fuzzers: random calls, mutated files and random kills, checked against what the package promises.

``python -m tests.fuzz [SUBJECT ...] --count N --seed S``. A subject is a module with ``prepare(folder)``, which returns
a function of a `Draw` and of a folder for the case's files. That function returns the outcome of the case, in a word or
two, and raises `Fault`, or lets through whatever the package should not have raised.
"""
