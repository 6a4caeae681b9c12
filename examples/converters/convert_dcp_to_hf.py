"""Write a checkpoint's weights as a Hugging Face folder: `uv run examples/converters/convert_dcp_to_hf.py --help`."""

import sys

from nemo_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
