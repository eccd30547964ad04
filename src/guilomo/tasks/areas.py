"""Areas of the Python standard library, after the chapters of its reference; names of top-level modules.

Left out on purpose: tkinter, turtle, idlelib (GUI; often not installed), modules that newer Pythons have
removed, and modules that fit several areas (os, sys, argparse, platform).
"""

from __future__ import annotations

AREAS: dict[str, str] = {
    "data types and text": """
        _collections_abc _pydatetime _strptime _weakrefset abc bisect calendar codecs collections contextlib
        copy copyreg dataclasses datetime difflib encodings enum functools gettext graphlib heapq locale
        operator pprint re reprlib shlex string stringprep textwrap types typing weakref zoneinfo""",
    "numbers and mathematics": """
        _pydecimal colorsys decimal fractions numbers random statistics""",
    "files and persistence": """
        _compression _pyio bz2 compression configparser csv dbm filecmp fileinput fnmatch genericpath glob
        gzip io linecache lzma netrc ntpath pathlib pickle pickletools plistlib posixpath shelve shutil
        sqlite3 stat tarfile tempfile tomllib zipapp zipfile zipimport""",
    "concurrency": """
        _threading_local asyncio concurrent multiprocessing queue sched signal subprocess threading""",
    "networking and internet": """
        ftplib http imaplib ipaddress poplib selectors smtplib socket socketserver ssl urllib uuid webbrowser
        wsgiref xmlrpc""",
    "markup and email": """
        _markupbase base64 email html json mailbox mimetypes quopri xml""",
    "development tools": """
        ast bdb cProfile code codeop compileall dis doctest importlib inspect logging modulefinder opcode pdb
        pkgutil profile pstats py_compile pyclbr pydoc runpy symtable tabnanny timeit token tokenize trace
        traceback tracemalloc unittest warnings""",
}
AREA_NAMES: tuple[str, ...] = tuple(AREAS)
MODULE_AREA: dict[str, int] = {
    module: index for index, modules in enumerate(AREAS.values()) for module in modules.split()
}
