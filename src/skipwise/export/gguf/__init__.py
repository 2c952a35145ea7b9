"""A model folder as a GGUF file that llama.cpp reads right: convert, mend the RoPE keys, check.

asked.py reads what a folder's config.json asks for and refuses what llama.cpp cannot compute;
convert.py runs llama.cpp's own script; keys.py works out what llama.cpp will compute from a file's
keys and mends them; file.py reads and rewrites the file; tokenizer.py answers what the script does
not know of a tokenizer.
"""

from skipwise.export.gguf.convert import OUTTYPES, find_converter, to_gguf
from skipwise.export.gguf.keys import check_gguf

__all__ = ["OUTTYPES", "check_gguf", "find_converter", "to_gguf"]
