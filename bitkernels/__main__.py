"""`python -m bitkernels`; the commands are in `bitkernels.cli`."""

from bitkernels.cli import main

if __name__ == "__main__":
    main()
