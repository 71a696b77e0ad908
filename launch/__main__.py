"""`python -m launch` is `emotion-launch`."""

import sys

if __name__ == "__main__":
    from launch.cli import main

    sys.exit(main())
