"""Holds what the backends share."""
