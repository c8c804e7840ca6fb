"""Run hjepa from a checkout: `python launch.py [group=option] [key=value]`; see conf/ and `python launch.py --help`.

This is the command `hjepa` of an installed package, but outputs/ and data/ lie in the checkout.
"""

from pathlib import Path

from hjepa.cli import main

if __name__ == "__main__":
    main(home=Path(__file__).resolve().parent)
