"""Changing a model: repacking, repair, schedules, zeros in the weights."""
