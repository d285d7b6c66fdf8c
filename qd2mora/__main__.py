"""`python -m qd2mora`, which is what launchers of several processes start."""

from qd2mora.cli import main

if __name__ == "__main__":
    main()
