"""Subjects with faults that the fuzzer has to find: one a module."""
