"""Set numbers in a GGUF file, and copy it with other keys and tensors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from skipwise.models.convert.gguf_file import gguf_package, open_gguf


def set_numbers(file: Path, values: dict[str, int | float]) -> None:
    """Set numbers of existing keys in place."""
    reader = open_gguf(file, "r+")
    for key, value in values.items():
        field = reader.fields[key]
        field.parts[field.data[0]][0] = value
    reader.data.flush()


def rewrite(
    file: Path, keys: dict[str, str | int | float | None], tensors: dict[str, np.ndarray]
) -> None:
    """Copy the file with other keys and other float32 tensors. None removes a key.

    A new key cannot be added to a GGUF file in place.
    """
    gguf = gguf_package()
    reader = open_gguf(file)
    copy = file.with_name(file.name + ".fixed")
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    types = gguf.GGUFValueType
    kinds = {str: types.STRING, int: types.UINT32, float: types.FLOAT32}
    try:
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
                continue
            kind, *inner = field.types
            of = inner[-1] if inner else None
            writer.add_key_value(name, field.contents(), kind, sub_type=of)
        for name, value in keys.items():
            if value is not None:
                writer.add_key_value(name, value, kinds[type(value)])
        kept = [t for t in reader.tensors if t.name not in tensors]
        for t in kept:
            size = t.data.nbytes
            writer.add_tensor_info(t.name, list(t.data.shape), t.data.dtype, size, t.tensor_type)
        for name, data in tensors.items():
            writer.add_tensor_info(name, list(data.shape), data.dtype, data.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in [*(t.data for t in kept), *tensors.values()]:
            writer.write_tensor_data(data)
        writer.close()
        os.replace(copy, file)
    finally:
        copy.unlink(missing_ok=True)
