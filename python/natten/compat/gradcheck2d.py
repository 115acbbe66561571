# SPDX-License-Identifier: MIT
"""Era 0.13: `python -m natten.gradcheck2d -b 1 -n 2 -x 14 -y 14 -d 32 -k 7 --dilation 2`: on a plane."""

from ._gradcheck import main

if __name__ == "__main__":
    main(rank=2)
