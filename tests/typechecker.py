"""The runtime checker of the tests: where a float is asked for, a whole number will do, as in Python's typing."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
