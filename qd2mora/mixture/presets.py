"""The table of methods, by name.

Every method is y = W x + s B K_t A x and differs only in K_t: how the banks are paired, what lies between them, and
what the gates read. Sources name the public code each row was checked against; a row whose formula had to be inferred
says so (`mark`, `note`) and is not a reproduction.
"""

from qd2mora.errors import InputRefused, nearest
from qd2mora.mixture.chains import CHAINS
from qd2mora.mixture.method import Method
from qd2mora.mixture.pairs import PAIRS

METHODS: dict[str, Method] = {method.name: method for method in (*CHAINS, *PAIRS)}


def find_method(name: str) -> Method:
    """Return a row of the table. Raises InputRefused naming the nearest one."""
    if name in METHODS:
        return METHODS[name]
    raise InputRefused(f"adapter.method: unknown method '{name}'; {nearest(name, METHODS)}")


__all__ = ["METHODS", "find_method"]
