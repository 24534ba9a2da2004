"""The command line."""
from __future__ import annotations
import sys
from rlsys.config import load_config
from rlsys.launch import train
def main() -> None:
    train(load_config(sys.argv[2], sys.argv[3:]))
if __name__=="__main__": main()
