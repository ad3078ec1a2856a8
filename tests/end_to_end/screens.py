"""Commands in a terminal of a given width, and what stood on its screen."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
FRAME = re.compile(r"[│┃┏┓┗┛┡┩┳┻╇┴┬┼┌┐└┘├┤─━╋┠┨]")


def show_screen(columns: int, *arguments: object, code: int = 0) -> list[str]:
    """The lines that a command printed on a terminal, without colours."""
    front, back = pty.openpty()
    fcntl.ioctl(back, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "LINES")}
    command = [sys.executable, "-m", "hftcli", *map(str, arguments)]
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=back, stderr=back, env=environment)
    os.close(back)
    parts = []
    while True:
        try:
            part = os.read(front, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(front)
    text = CODES.sub("", b"".join(parts).decode())
    assert process.wait() == code, text
    return [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]


def list_words(lines: list[str]) -> set[str]:
    """Words and numbers, without the frames of tables."""
    return {word for line in lines for word in FRAME.sub(" ", line).split()}
