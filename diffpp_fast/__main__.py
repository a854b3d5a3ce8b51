"""`python -m diffpp_fast` is `diffpp-fast`."""

from diffpp_fast.cli.main import run

if __name__ == "__main__":
    run()
