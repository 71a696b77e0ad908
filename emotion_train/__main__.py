"""`python -m emotion_train` is `emotion-train`."""

import sys

if __name__ == "__main__":
    from emotion_train.cli import main

    sys.exit(main())
