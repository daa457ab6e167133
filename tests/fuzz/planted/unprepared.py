"""A subject that cannot be prepared."""


def prepare(folder):
    raise RuntimeError("no files to begin with")
