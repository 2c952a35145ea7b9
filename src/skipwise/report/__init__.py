def format_table(rows):
    return "\n".join(str(r) for r in rows)


def write_report(path):
    return path
