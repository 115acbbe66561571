# SPDX-License-Identifier: MIT
"""Era 0.13: `python -m natten.gradcheck1d -b 1 -n 2 -x 14 -d 8 -k 7 --dilation 2`: gradients on a line, checked."""

from ._gradcheck import main

if __name__ == "__main__":
    main(rank=1)
