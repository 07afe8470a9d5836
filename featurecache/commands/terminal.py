"""Click commands: how they are declared, the options they share, text and JSON output, exit codes, errors as sentences.

A command is a function that takes a `Console` and its options, calls one library function and prints. Results go to
stdout, talk and progress to stderr. Modules of commands load nothing heavy before a command runs.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from featurecache.commands.help import CONTEXT, Command, Context, Option, option, options_of
from featurecache.errors import (
    BadOption,
    FeatureCacheError,
    PreprocessingRefused,
    Reading,
    SeveralReadings,
    UnknownName,
    WeightsDoNotFit,
    nearest,
)
from featurecache.files.atomic import NO_ROOM, cannot_write, refuse_special
from featurecache.files.names import check_path
from featurecache.formatting import (
    PARTS,
    TABLE_WIDTH,
    clear_status,
    fold,
    harmless,
    is_harmless,
    join_names,
    one_line,
    parts_line,
    shell_word,
    shell_words,
    show_status,
    terminal_width,
    with_addresses,
)

_PLAIN = "featurecache.plain"  # how characters that a terminal's code page lacks are written
_SIGNS = {"×": "x", "–": "-", "−": "-", "·": "|", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "∕": "/"}  # of ours


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Our signs by their neighbours in ASCII, every other character by its number."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error(_PLAIN, _plain)


class CommandGroup(click.Group):
    """Commands in the order of a day's work; a misspelt one names its neighbours."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            near = nearest(args[0], self.commands)
            raise click.UsageError(f'no command is called "{args[0]}".{near} There are {", ".join(self.commands)}.')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What each is for, up to the first colon: click cuts what does not fit one line."""
        rows = [(name, each.get_short_help_str(limit=200)) for name, each in self.commands.items()]
        with formatter.section("Commands, each with a --help of its own"):
            formatter.write_dl([(name, re.split("[:;]|\\.$", text)[0]) for name, text in rows])

    def main(self, *args: Any, **options: Any) -> Any:
        """click's own errors in the form of ours; no character ends a command, whatever the terminal can show."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=_PLAIN)
        # Imports of torch make a million objects, none of them garbage: looking through them again and again takes a
        # fifth of a start, and at the end of the process a second.
        gc.set_threshold(20_000, *gc.get_threshold()[1:])
        atexit.register(gc.freeze)
        with _as_interrupts():
            try:
                code = super().main(*args, **{**options, "standalone_mode": False})
            except click.Abort:
                click.echo("stopped.", err=True)
                code = 1
            except click.ClickException as error:
                word = "" if type(error).__name__ == "NoArgsIsHelpError" else "error: "  # `featurecache` alone
                _echo(word + error.format_message(), err=True)
                code = error.exit_code
            sys.exit(code or 0)


@contextlib.contextmanager
def _as_interrupts() -> Iterator[None]:
    """SIGTERM (a batch system's, `kill`) and SIGHUP (a terminal that closes) end a command as Ctrl-C does, once; the
    exit code is 128 + the number. Of a command that was told to ignore one (nohup) it stays ignored."""
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:  # another one does not stop what the first began
            raise KeyboardInterrupt

    own = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in own:
        signal.signal(number, interrupt)
    try:
        yield
    except (SystemExit, OSError) as error:  # OSError: the terminal is gone, and what is said cannot be written
        if received:
            raise SystemExit(128 + received[0]) from error
        raise
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)


def _echo(text: str, err: bool = False) -> None:
    """Text as a terminal shows it without breaking a word; into a file or a pipe as it is."""
    clear_status()
    click.echo(fold(harmless(with_addresses(text)), terminal_width(sys.stderr if err else sys.stdout)), err=err)


class Console:
    """Where lines go: results to stdout, talk to stderr; under --json one object is the result."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.json, self.progress = as_json, not quiet

    def say(self, line: str) -> None:
        if self.progress:
            _echo(line, err=True)

    def status(self, doing: str) -> None:
        """What is being done, until the next line: for what takes seconds and has no steps."""
        show_status(doing, self.progress)

    def line(self, line: str) -> None:
        """`say` where the line holds names of somebody else's: they cannot make lines of their own."""
        self.say(one_line(line))

    def warn(self, sentences: Iterable[str]) -> None:
        for sentence in sentences:
            self.say(f"warning    {sentence}")

    def result(self, text: str, record: Any) -> None:
        """The command's result, as lines or as one JSON object (see `record_of`)."""
        if self.json:
            clear_status()
            click.echo(_json(record))
        else:
            _echo(text)

    def next(self, command: str, cache: str | None = None) -> None:
        if not self.json:
            self.say(f"next       {one_line(command)}" + (f" --cache {shell_word(cache)}" if cache else ""))


def record_of(value: Any) -> Any:
    """What a command prints as JSON: the fields of a dataclass, without those of ``repr=False``; a path as text."""
    if isinstance(value, Path):
        return str(value)
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.repr}


def _json(record: Any) -> str:
    """JSON with letters as they are; what a terminal would obey or lacks is escaped, which means the same in JSON."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=record_of)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(record, allow_nan=False, default=record_of)
    return "".join(c if is_harmless(c) else json.dumps(c)[1:-1] for c in with_addresses(text))


def _report(error: FeatureCacheError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first, *rest = str(error).splitlines()
    word = "" if type(error).__name__ == "Stopped" else "error: "  # Ctrl-C is none
    _echo("\n".join([word + first, *(" " * 7 + line.strip() for line in rest)]), err=True)
    for reading in error.readings if isinstance(error, SeveralReadings) else ():
        _echo(f"       {one_line(reading.words)}: {one_line(typed_command(reading=reading))}", err=True)
    typed = BadOption | UnknownName | SeveralReadings | WeightsDoNotFit | PreprocessingRefused  # of what was asked for
    return 2 if isinstance(error, typed) else 1


def typed_options(reading: Reading | None = None) -> dict[str, list[str]]:
    """Option or argument -> the words that give it again, of those that were typed, and behind them of a reading."""
    context, given, chosen = click.get_current_context(), dict[str, list[str]](), dict[str, list[str]]()
    values = context.params if reading is None else _read_as(context.params, reading)
    for each in context.command.params:
        name = str(each.name)
        value, read = values.get(name), reading is not None and name in reading.options
        typed = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if read or (typed and name not in ("as_json", "quiet", "debug")):
            several = value if isinstance(value, tuple) else (value,)
            texts = [[] if isinstance(v, bool) else [_text(v)] for v in several]
            flag = (each.secondary_opts if value is False else each.opts)[:1] if isinstance(each, click.Option) else []
            (given if typed else chosen)[name] = [word for text in texts for word in flag + text]
    return given | chosen


def typed_command(*without: str, name: str = "", reading: Reading | None = None) -> str:
    """The command again as it was typed, or that called ``name`` with its options; ``without`` some of them; with those
    of a reading."""
    words = [word for each, part in typed_options(reading).items() if each not in without for word in part]
    return shell_words(["featurecache", name or click.get_current_context().info_name, *words])


def _text(value: Any) -> str:
    return "auto" if value is None else join_names(value) if isinstance(value, list) else str(value)


def _read_as(options: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The options of a command with those of a reading. What may be given several times stays as typed, of columns
    (see `pairs_of`) the other roles."""
    read: dict[str, Any] = {
        name: (*options.get(name, ()), *value) if isinstance(value, tuple) else value
        for name, value in reading.options.items()
    }
    if columns := read.get("columns"):
        pairs = [pair for pair in options.get("columns", ()) if pair.partition("=")[0] not in columns]
        read["columns"] = (*pairs, *(f"{role}={name}" for role, name in columns.items()))
    return options | read


def _run(function: Callable[..., Any], talk: Console, options: dict[str, Any]) -> Any:
    """The command; at a terminal, where what it was given can be read in several ways, with the one that a person
    chooses. Raises SeveralReadings elsewhere, where none is chosen, and where the command has no such options."""
    while True:
        try:
            return function(talk, **options)
        except SeveralReadings as several:
            names = {name for reading in several.readings for name in reading.options} - {"data"}
            if not (names <= options.keys() and is_terminal()):
                raise
            _echo(str(several), err=True)
            for number, reading in enumerate(several.readings, 1):
                _echo(f"  {number}  {one_line(reading.words)}", err=True)
            numbers = [str(number + 1) for number in range(len(several.readings))]
            try:
                answer = click.prompt("which", default="none", type=click.Choice([*numbers, "none"]), err=True)
            except click.Abort:  # the cursor is behind the question
                click.echo(err=True)
                raise
            if answer == "none":
                raise
            reading = several.readings[int(answer) - 1]
            options, context = _read_as(options, reading), click.get_current_context()
            for name in reading.options:  # as if it had been typed: the next command says it too
                context.params[name] = options[name]
                context.set_parameter_source(name, click.core.ParameterSource.COMMANDLINE)


def _check_places(options: dict[str, Any]) -> None:
    """Where results go, before they are computed: a name that no file can have, a pipe or device in its place."""
    for name, option_name in (("out", "--out"), ("csv_file", "--csv"), ("sheet", "--sheet")):
        if options.get(name):
            check_path(options[name], option_name)
            refuse_special(options[name])


def _mute_stdout() -> None:
    """What is still to be written there cannot be: python would say so once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def command(function: Callable[..., Any]) -> click.Command:
    """A command: the options every command has, and errors as one or two sentences with an exit code."""

    @functools.wraps(function)
    def wrapped(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        start, console = time.perf_counter(), Console(as_json, quiet)
        width, timed = TABLE_WIDTH.set(terminal_width(sys.stdout)), PARTS.set({} if debug else None)
        try:
            _check_places(options)
            console.status("loading")
            code = _run(function, console, options)
            if parts := PARTS.get():
                console.say(f"time       {parts_line(parts, time.perf_counter() - start)}")
        except FeatureCacheError as error:
            code = _report(error, debug)
        except (click.ClickException, click.Abort):
            raise
        except BrokenPipeError:  # `featurecache ls | head`
            _mute_stdout()
            code = 0
        except Exception as error:
            if debug:
                raise
            if isinstance(error, OSError) and error.errno in NO_ROOM:  # in a library, or where stdout goes
                if error.filename is None:
                    _mute_stdout()
                sys.exit(_report(cannot_write(error, error.filename or "the result"), debug))
            from featurecache.backbones.user_code import user_line

            users = user_line(error)  # of a python: head or backbone
            ours = f"{type(error).__name__}: {error} (a mistake of ours; --debug shows where)"
            words = f"{users} (--debug shows how it came there)" if users else ours
            _echo(f"error: {words}", err=True)
            code = 2 if users else 1
        finally:
            clear_status()
            TABLE_WIDTH.reset(width)
            PARTS.reset(timed)
        sys.exit(code or 0)

    made = click.command(cls=Command, context_settings=CONTEXT)(wrapped)
    ending = [
        Option(["--json", "as_json"], is_flag=True, help="One JSON object on stdout."),
        Option(["--quiet", "-q"], is_flag=True, help="Results only: no talk, no progress bar."),
        Option(["--debug"], is_flag=True, help="Show where an error came from, and where the time went."),
    ]
    for each in ending:
        each.section = "output"
    made.params += ending
    return made


cache_option = option(
    "--cache", metavar="DIR", help="Folder of the cache, or s3://…. [default: $FEATURECACHE_DIR, else ./cache]"
)
features_option = option(
    "--features", metavar="VIEW", help="A view: path, STORE/VIEW or name. [default: that of the last extraction]"
)
device_option = option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps.")
moved_weights = option(
    "--weights", metavar="PATH", help="Where the backbone's weights are now, if not where they were."
)
trust_option = option("--trust-code", is_flag=True, help="Import the module of a python: head or backbone.")
of_backbone_options = options_of(device_option, moved_weights, trust_option)
