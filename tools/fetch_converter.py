"""Put llama.cpp's converter into the cache folder, where `skipwise export --to gguf` looks for it.

python tools/fetch_converter.py

It is taken from the source archive of llama-cpp-python, of the version in constraints.txt: pip can
fetch that wherever it can install it, and the tests then see the converter and the runtime of one
llama.cpp.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from skipwise.config.machine import cache_folder

KEPT = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")


def main() -> None:
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    version = re.findall(r"^llama-cpp-python==(\S+)$", pins, re.MULTILINE)[0]
    folder = cache_folder() / "llama.cpp"
    stamp = folder / ".version"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == version:
        return
    with tempfile.TemporaryDirectory() as scratch:
        asked = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", scratch, *asked]
        subprocess.run(pip, check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            for member in files:
                _, _, path = member.name.partition("/vendor/llama.cpp/")
                if member.isfile() and path.split("/")[0] in KEPT and ".." not in path:
                    out, data = folder / path, files.extractfile(member)
                    assert data is not None
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_bytes(data.read())
    stamp.write_text(version, encoding="utf-8")
    print(f"llama.cpp's converter: {folder}")


if __name__ == "__main__":
    main()
