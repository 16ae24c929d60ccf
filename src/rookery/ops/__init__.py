"""Operators: numerics only, one folder each.

`reference.py` defines the operator; every faster backend must agree with it, which `cases.py` and `tests/ops` hold them
to. The public functions are keyword-only, take a state and return a state.
"""
