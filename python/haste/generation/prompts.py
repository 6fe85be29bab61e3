"""--prompts: a text, a file with one on each line, or a folder of captioned data. Read without torch.

A resolved value is "" where none is given, the path of a folder, or texts that each end in a line break: so a text that
is also the name of a folder is known from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from haste.errors import UserError, in_one_line, shorten
from haste.io import read_bytes

LARGEST_FILE = 2**28  # bytes of a file of prompts: some four million of them
FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".md")  # of which no prompt is the name
LONGEST_SHOWN = 60  # letters of a prompt in a record
WANTED = "--prompts must be a text, a UTF-8 file with one on each line, or a folder of captioned data"


def list_prompts(given: str) -> str:
    """--prompts with the name of a file replaced by its lines; the same of what is resolved already.

    Raises:
        UserError: no prompt, a file that is not UTF-8 or does not exist.
    """
    if not given:
        return ""
    path = None if "\n" in given else existing_path(given)
    if path is not None and path.is_dir():
        return given
    if path is None and is_name_of_file(given):
        raise UserError(f"{WANTED}, got {given}, which does not exist")
    if path is None:
        return join_prompts(given.split("\n"), shorten(given))
    return join_prompts(_read(path, given).split("\n"), given)


def join_prompts(texts: Iterable[str], source: str) -> str:
    """Texts as one resolved value; those without a letter are left out.

    Raises:
        UserError: none is left, or one cannot be UTF-8; names `source`.
    """
    lines = [" ".join(text.split()) for text in texts]
    filled = [line for line in lines if line]
    if not filled:
        raise UserError(f"{WANTED}, got {source}, which has no prompt")
    for line in filled:
        if not _is_utf8(line):
            raise UserError(f"{WANTED}, got {shorten(ascii(line))}, which is not UTF-8")
    return "".join(f"{line}\n" for line in filled)


def prompt_texts(resolved: str) -> list[str]:
    """The texts of a resolved value; none of a folder."""
    return resolved.split("\n")[:-1]


def prompt_folder(resolved: str) -> Path | None:
    """The folder of captioned data of a resolved value, if it is one."""
    return Path(resolved).expanduser() if resolved and not resolved.endswith("\n") else None


def describe_prompts(resolved: str) -> str:
    """A resolved value for a record: the prompt, the name of the folder, or how many they are and a digest."""
    texts = prompt_texts(resolved)
    if len(texts) == 1 and len(texts[0]) <= LONGEST_SHOWN:
        return texts[0]
    folder = prompt_folder(resolved)
    return f"{len(texts)} prompts, {_digest(resolved)}" if folder is None else folder.resolve().name


def name_prompts(resolved: str) -> str:
    """A resolved value for the name of a folder, such as prompts3_1a2b3c4d, or prompts-val of a folder."""
    texts, folder = prompt_texts(resolved), prompt_folder(resolved)
    if folder is not None:
        return "prompts-" + re.sub(r"[^\w.-]+", "_", folder.resolve().name)[:40]
    return f"prompts{len(texts)}_{_digest(resolved)}"


def existing_path(given: str) -> Path | None:
    """The path of this name, if there is one."""
    try:
        path = Path(given).expanduser()
        return path if given and len(given) <= 4096 and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, NUL in it, ~ of an unknown user
        return None


def is_name_of_file(given: str) -> bool:
    """Whether a text can only be meant as the name of a file or a folder."""
    one_word = not any(letter.isspace() for letter in given)
    return one_word and (given.endswith(FILES) or given.startswith(("/", "./", "../", "~/")))


def _read(path: Path, given: str) -> str:
    try:
        return read_bytes(path, LARGEST_FILE).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{WANTED}, got {given}: {in_one_line(error)}") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
