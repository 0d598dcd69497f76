"""The two sources of text."""

import subprocess
import sys

import pytest

from sae_fast.data import text


@pytest.fixture(scope="module")
def documentation():
    return text.stdlib_documentation()


def test_the_documentation_is_large_and_readable(documentation):
    assert 1.3e6 < len(documentation) < 2.5e6
    assert "Assert statements are a convenient way to insert debugging assertions" in documentation  # a topic
    assert "Dict subclass for counting hashable items." in documentation  # collections.Counter's docstring


@pytest.mark.slow
def test_it_is_the_same_in_another_process(documentation):
    script = "import sys, sae_fast.data.text as t; sys.stdout.buffer.write(t.stdlib_documentation().encode())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert other.stdout == documentation.encode()


def test_public_docstrings_in_the_order_of_the_source(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_m.py").write_text('"""A test."""')
    (tmp_path / "_private.py").write_text('"""A private module."""')
    (tmp_path / "undocumented.py").write_text("x = 1")
    (tmp_path / "m.py").write_text(
        '"""A module."""\n'
        "raise RuntimeError('imported')\n"
        'class A:\n    """A class."""\n    def f(self):\n        """A method."""\n'
        '    def _g(self):\n        """A private method."""\n'
        'class _B:\n    def h(self):\n        """Inside a private class."""\n'
        'async def last():\n    """A coroutine."""\n'
    )
    assert list(text._module_documents(tmp_path)) == [("m.py", "A module.\n\nA class.\n\nA method.\n\nA coroutine.")]


def test_a_python_without_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources in"):
        list(text._module_documents(tmp_path))


def test_a_users_own_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffnaïve\n".encode())
    assert text.read_text_file(file) == "naïve\n"


@pytest.mark.parametrize(
    "content, error, message",
    [
        (None, FileNotFoundError, "does not exist"),
        (b" \n", ValueError, "is empty"),
        (b"abc\xff", ValueError, "is not UTF-8: byte 3"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, error, message):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        text.read_text_file(file)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        text.read_text_file(tmp_path)
