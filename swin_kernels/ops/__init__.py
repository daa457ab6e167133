"""One file for each operator: contract, validation, call type, schema, shapes, gradients, autocast, examples.

The files register their operators in `OPERATORS`; those that begin with an underscore hold what operators share.
"""

from __future__ import annotations

import importlib
import pkgutil

from ._operator import OPERATORS, Operator, operator_of

__all__ = ["OPERATORS", "Operator", "explain", "operator_of"]

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


def explain(operator="window_attention", /, *arguments, **options) -> dict[str, str | None]:
    """Why each backend would decline a call: name to reason, None if it runs it.

    Args:
        operator: a public function of an operator, or its name. A tensor in its place is taken as the first
            argument of `window_attention`.
        arguments, options: of the function, without `backend`.

    Raises:
        ValueError: there is no such operator.
        TypeError, ValueError: as the function itself raises.
    """
    if not callable(operator) and not isinstance(operator, str):
        operator, arguments = "window_attention", (operator, *arguments)
    return operator_of(operator).explain(*arguments, **options)
