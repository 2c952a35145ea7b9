"""A model folder as a GGUF file that llama.cpp reads correctly.

requirements.py reads what a folder's config.json requires, and refuses what llama.cpp cannot
compute. convert.py runs llama.cpp's own script. keys.py computes what llama.cpp will make of a
file's RoPE keys, and fixes them. file.py reads and rewrites the file. tokenizer.py names tokenizers
that the script does not know.
"""

from skipwise.export.gguf.convert import OUTTYPES, find_converter, to_gguf
from skipwise.export.gguf.keys import check_gguf

__all__ = ["OUTTYPES", "check_gguf", "find_converter", "to_gguf"]
