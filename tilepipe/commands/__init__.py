"""Commands: one file for each command of ``tilepipe``, with its options, its call and its words.

Only these files and `tilepipe.cli` print; they import what is heavy when a command is called.
"""
