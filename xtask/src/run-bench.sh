#!/bin/sh
# Times products and experts on the first GPU of this host, in turns with PyTorch where there is one; a short table
# comes last. Needs a driver for CUDA 13, NVRTC and Python 3. Arguments go to peers.py.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
exec python3 "$here/peers.py" "$here/op_suite" "$@"
