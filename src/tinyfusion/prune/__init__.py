"""Criteria that decide which blocks stay; each returns a `PrunePlan`."""
