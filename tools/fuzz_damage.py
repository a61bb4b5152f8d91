"""Damage of bytes, JSON, archives and folders, by a generator of random numbers; see fuzz.py."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import struct
import zipfile


def damaged(random, data):
    """Bytes with one to three kinds of damage; half of it near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        end = len(data) if random.random() < 0.5 else min(len(data), 512)
        at, length = random.randrange(end), random.choice((1, 4, 16, 200))
        match random.choice(("flip", "flip", "flip", "cut", "zero", "number", "remove", "insert", "move", "text")):
            case "flip":
                for _ in range(random.choice((1, 1, 4, 32))):
                    data[random.randrange(end)] ^= 1 << random.randrange(8)
            case "cut":
                del data[random.choice((0, at, random.randrange(len(data)), len(data) - 1)) :]
            case "zero":
                data[at : at + length] = bytes(len(data[at : at + length]))
            case "number":
                number = random.choice((-1, 0, 2**31 - 1, -(2**31), 2**16, 1))
                at -= at % 4
                data[at : at + 4] = struct.pack("<i", number)
            case "remove":
                del data[at : at + length]
            case "insert":
                data[at:at] = random.randbytes(length)
            case "move":
                other = random.randrange(len(data))
                data[at : at + length] = data[other : other + length]
            case "text":
                for i in range(at, min(at + length, len(data))):
                    if 48 <= data[i] < 123:
                        data[i] = random.randrange(48, 123)
    return bytes(data)


ODD = (  # values of JSON
    *(None, True, False, 0, 1, -1, 2, 5, 10**6, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.5, 1e-300, 1e308),
    *("", "x", "NaN", "5", "é" * 300, "\x00", "\x1b[2J", "../../x", "/etc/passwd", "C:\\x", "a\nb", "😀", "__class__"),
    *([], {}, [[]], [None], {"a": 1}, [1, 2], [1e9] * 3, ["x"], [0, 0, 0], [3, 10**6, 10**6]),
)
RAW = {"@deep": "[" * 20000 + "]" * 20000, "@nan": "NaN", "@inf": "-Infinity", "@big": "9" * 5000, "@bad": "\\ud800"}


def damaged_json(random, text):
    """JSON with other values, or with the bytes of its text damaged; as bytes."""
    if random.random() < 0.1:
        return damaged(random, text.encode())
    tree = json.loads(text)
    raw = {}
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = random.choice(places)
        match random.choice(("odd", "odd", "odd", "odd", "raw", "remove", "rename", "list", "number")):
            case "odd":
                holder[key] = copy.deepcopy(random.choice(ODD))  # which later damage may change
            case "raw":
                name = random.choice(list(RAW))
                holder[key], raw[name] = name, RAW[name]
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[random.choice(("x", "", key.upper(), f"{key}s"))] = holder.pop(key)
            case "list":
                holder[key] = random.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3, str(holder[key])))
            case "number" if isinstance(holder[key], int | float):
                holder[key] = random.choice((-holder[key], holder[key] * 10, holder[key] + 0.5, int(holder[key]) + 1))
    if random.random() < 0.03:
        tree = random.choice(([tree], None, 5, "x", {}))
    text = json.dumps(tree)
    for name, replacement in raw.items():
        text = text.replace(f'"{name}"', f'"{replacement}"' if name == "@bad" else replacement)
    return text.encode()


def _places(tree):
    """(dict or list, key or index) of every value."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def damaged_archive(random, path, pick):
    """Damages one member of a zip archive, and writes the archive anew, so that its checksums fit."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in members if pick in name]
    name = random.choice(names or list(members))
    parts = members[name]
    members[name] = damaged_json(random, parts.decode()) if name.endswith(".json") else damaged(random, parts)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def damaged_folder(random, folder):
    """Does to a folder of files what happens to such folders."""
    for _ in range(random.choice((1, 2, 4, 8))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        folders = sorted(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())
        file = random.choice(files) if files else folder / "0.png"
        inside = random.choice([folder, *folders])
        match random.choice(("damage", "damage", "damage", "all", "remove", "rename", "move", "link", "folder", "odd")):
            case "damage" if files:
                overwrite(file, lambda data: damaged(random, data))
            case "all":
                for one in files:
                    overwrite(one, lambda data: damaged(random, data))
            case "remove" if files:
                file.unlink()
            case "rename" if files:
                name = random.choice(
                    ("x", "x.txt", "x.PNG", ".x.png", "train", "é" * 60 + ".png", "a\nb.png", "\udcff.png")
                )
                file.rename(file.with_name(name)) if not file.with_name(name).exists() else None
            case "move" if files:
                file.rename(inside / file.name) if not (inside / file.name).exists() else None
            case "link":
                place = inside / f"link{random.randrange(9)}.png"
                target = random.choice((folder, file, pathlib.Path("/dev/zero"), folder / "nowhere", place))
                place.symlink_to(target) if not os.path.lexists(place) else None
            case "folder":
                made = inside / random.choice(("train", "val", "test", "images", "empty", "x.png", "1"))
                made.mkdir() if not os.path.lexists(made) else None
            case "odd":
                if random.random() < 0.5 and not os.path.lexists(inside / "pipe.png"):
                    os.mkfifo(inside / "pipe.png")
                else:
                    (inside / random.choice(("x.png", "x", "x.svg", "Thumbs.db"))).write_bytes(
                        b""
                    ) if inside.is_dir() else None


def overwrite(path, change):
    path.write_bytes(change(path.read_bytes()))
