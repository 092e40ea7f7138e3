"""Tables in Markdown."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """In columns that also read well as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * max(3, width) for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
