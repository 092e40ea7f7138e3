"""What the CUDA compiler said about each kernel: registers, shared memory, stack, spills.

    python tools/kernel_report.py --output FOLDER OBJECT...

Reads what nvcc_with_report.sh left beside the object files; writes FOLDER/kernels.json and
FOLDER/kernels.txt, and prints the latter.
"""

import argparse
import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
# field: the number in what ptxas says
FIELDS = {
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
    "static_shared_bytes": re.compile(r"(\d+) bytes smem"),
}


def parse(text: str) -> list[dict[str, Any]]:
    """An entry a function and architecture; a function that kernels call has registers None."""
    functions: list[dict[str, Any]] = []
    arch = ""
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            arch = entry[2]
        elif function := FUNCTION.search(line):
            empty = {name: None if name == "registers" else 0 for name in FIELDS}
            functions.append({"symbol": function[1], "arch": arch, **empty})
        elif functions:
            found = {name: pattern.search(line) for name, pattern in FIELDS.items()}
            functions[-1].update({name: int(match[1]) for name, match in found.items() if match})
    return functions


def demangled(symbols: list[str]) -> dict[str, str]:
    if shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in symbols}
    text = "\n".join(symbols)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return dict(zip(symbols, map(short, done.stdout.splitlines()), strict=True))


def short(signature: str) -> str:
    """`void mor::cuda::(anonymous namespace)::scale<mor::bfloat16>(float*)`: scale<bfloat16>."""
    name = re.sub(
        r"^void |_INTERNAL_\w+::|\(anonymous namespace\)::|\bmor::(cuda::)?", "", signature
    )
    depth = 0
    for i in reversed(range(len(name))):  # the parameters are the last pair of parentheses
        depth += (name[i] == ")") - (name[i] == "(")
        if name[i] == "(" and depth == 0:
            return name[:i]
    return name


def report(objects: list[Path]) -> list[dict[str, Any]]:
    kernels = []
    for path in objects:
        source = re.sub(r"^.*\.dir/|\.o$", "", str(path))
        text = path.with_name(path.name + ".ptxas").read_text()
        kernels += [{"source": source, **function} for function in parse(text)]
    names = demangled(sorted({kernel["symbol"] for kernel in kernels}))
    kernels = [{"kernel": names[kernel["symbol"]], **kernel} for kernel in kernels]
    return sorted(kernels, key=lambda kernel: (kernel["source"], kernel["kernel"], kernel["arch"]))


def spills(kernel: dict[str, Any]) -> bool:
    return bool(kernel["spill_store_bytes"] or kernel["spill_load_bytes"])


def cell(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return "-"
    text = "call" if kernel["registers"] is None else str(kernel["registers"])
    for field, unit in (("static_shared_bytes", "shared"), ("stack_bytes", "stack")):
        if kernel[field]:
            text += f", {unit} {kernel[field]}"
    if spills(kernel):
        text += f", spills {kernel['spill_store_bytes']}+{kernel['spill_load_bytes']}"
    return text


def table(kernels: list[dict[str, Any]]) -> str:
    """A line a kernel, a column an architecture."""
    archs = sorted({kernel["arch"] for kernel in kernels})
    by_name: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for kernel in kernels:
        by_name[kernel["source"], kernel["kernel"]][kernel["arch"]] = kernel
    rows = [["kernel", *archs]]
    for (_, name), of_arch in by_name.items():
        rows.append([name, *(cell(of_arch.get(arch)) for arch in archs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    spilling = len({kernel["kernel"] for kernel in kernels if spills(kernel)})
    return "\n".join(
        [
            "CUDA kernels: registers a thread; where there are any, bytes of static shared memory, "
            "stack, and spill stores + loads",
            *lines,
            f"{len(by_name)} kernels, {spilling or 'none'} with spills",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True, help="folder of kernels.json, .txt")
    parser.add_argument("objects", type=Path, nargs="*")
    args = parser.parse_args()
    kernels = report(args.objects)
    text = table(kernels)
    (args.output / "kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")
    (args.output / "kernels.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
