"""Devices and hosts, and what makes a network fast on them."""
