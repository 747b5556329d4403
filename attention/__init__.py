"""Distributed attention as a program.

The pure half (layouts, masks, schedules, programs, checker, lowering) needs neither torch nor processes; the executor
and its backends load only when a name of theirs is used (PEP 562).
"""
