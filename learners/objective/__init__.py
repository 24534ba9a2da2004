"""Advantages, losses and the joint objective."""
