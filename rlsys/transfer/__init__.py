"""Transports of weights from the learner to the actors: the wire format, and one module for each transport."""
