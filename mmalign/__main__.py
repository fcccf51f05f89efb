"""`python -m mmalign`, `torchrun -m mmalign` and `accelerate launch -m mmalign`."""

from mmalign.cli import main

if __name__ == "__main__":
    main()
