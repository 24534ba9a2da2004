"""The config: its schema, files and rules, and the plans of stages and engines that follow from it."""
