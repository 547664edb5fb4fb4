"""Names of `blocks/scheme.py`."""

from tinyfusion.blocks.scheme import BlockGroup, check_range, consecutive_groups, parse_scheme, scheme_pairs

__all__ = ["BlockGroup", "check_range", "consecutive_groups", "parse_scheme", "scheme_pairs"]
