"""``python -m sae_fast``: the command line."""

from sae_fast.cli import app

if __name__ == "__main__":
    app(prog_name="sae-fast")
