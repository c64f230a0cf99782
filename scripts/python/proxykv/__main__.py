"""Checks an export's mapper against its parity vectors: `python -m proxykv EXPORT`, a folder or a hub name."""

import sys

from proxykv import check_parity

if len(sys.argv) != 2:
    sys.exit("usage: python -m proxykv EXPORT   (folder or hub name; checks the mapper against its parity vectors)")
difference = check_parity(sys.argv[1])
print(f"{sys.argv[1]}: largest difference from the parity vectors {difference:.1e}")
sys.exit(difference > 1e-5)
