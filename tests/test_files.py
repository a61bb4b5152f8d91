"""What every file is written and named by: the folder lock, hashes, and the memory of a process."""

import concurrent.futures
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from keras_vits._util import files
from keras_vits._util.process import peak_memory_bytes

pytestmark = pytest.mark.once

TIMES = 40
COUNT = """
import pathlib, sys
from keras_vits._util import files
for _ in range(int(sys.argv[2])):
    with files.alone(sys.argv[1]):
        count = pathlib.Path(sys.argv[1], "count")
        count.write_text(str(int(count.read_text()) + 1))
"""


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    """Processes and threads count together, reading and writing a file: without the lock, counts are lost."""
    count = tmp_path / "count"
    count.write_text("0")

    def up(_):
        with files.alone(tmp_path):
            count.write_text(str(int(count.read_text()) + 1))

    others = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path), str(TIMES)]) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(up, range(4 * TIMES)))
    assert [other.wait(60) for other in others] == [0, 0]
    assert count.read_text() == str(6 * TIMES)
    assert [path.name for path in tmp_path.iterdir()] == ["count"]  # the lock is gone


def test_an_error_gives_the_folder_free(tmp_path):
    with pytest.raises(KeyError), files.alone(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [files.LOCK]
        raise KeyError
    with files.alone(str(tmp_path / "new")):
        pass
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot write to .*file/folder: .*Choose another folder\."):
        with files.alone(tmp_path / "file" / "folder"):
            pass


def test_hashes(tmp_path):
    """Of a file its bytes'; of a folder those of the paths and bytes of all files, in order, as sidecars have them."""
    folder = tmp_path / "model.mlpackage"
    (folder / "Data").mkdir(parents=True)
    content = {"Data/weights.bin": bytes(range(256)) * 9000, "Manifest.json": b"{}"}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    whole = b"".join(name.encode() + data for name, data in content.items())
    assert files.sha256(folder) == hashlib.sha256(whole).hexdigest()
    assert files.sha256(folder / "Manifest.json") == hashlib.sha256(b"{}").hexdigest()
    assert files.size(folder) == sum(map(len, content.values()))


def test_the_peak_of_memory_is_this_processs_own():
    """It keeps what was given back, and begins anew in a child however large its parent is."""
    before = peak_memory_bytes()
    held = np.ones(25_000_000)  # 200 MB
    during = peak_memory_bytes()
    assert during >= held.nbytes and during >= before
    script = "from keras_vits._util.process import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 1e6 < child < held.nbytes
    del held
    assert peak_memory_bytes() == pytest.approx(during, rel=0.05)
