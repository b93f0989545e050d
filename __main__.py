"""``python -m moeplan``, which torchrun needs."""

from .service.cli import main

if __name__ == "__main__":
    main()
