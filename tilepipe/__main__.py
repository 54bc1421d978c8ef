"""``python -m tilepipe`` is ``tilepipe``."""

from tilepipe.cli import main

if __name__ == "__main__":
    main(prog_name="tilepipe")
