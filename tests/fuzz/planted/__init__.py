"""Subjects with faults that the fuzzer has to find: one per module."""
