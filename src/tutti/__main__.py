"""`python -m tutti` is the command `tutti`; the form that torchrun wants."""

from tutti.cli.main import main

if __name__ == "__main__":
    main()
