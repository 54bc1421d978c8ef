"""Launcher for a checkout: ``python cli.py segment ...`` is ``tilepipe segment ...``."""

from tilepipe.cli import main

if __name__ == "__main__":
    main()
