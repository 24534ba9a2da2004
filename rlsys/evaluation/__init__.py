"""Figures of an evaluation, from completions that are judged already. Nothing here generates."""
