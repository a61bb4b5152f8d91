"""JSON from outside: what decoding it raises."""

import msgspec

ERRORS = (
    msgspec.MsgspecError,
    UnicodeDecodeError,
    RecursionError,
)  # no JSON or of another form, no UTF-8, deep nesting
