"""Help of a command: its options in named sections, of which those that do not fit one screen are listed by name.

``--help`` shows the command's own options and as many sections as fit; ``--help SECTION`` shows one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

SCREEN = 45  # lines
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
READ = {"--data", "--features", "--run"}
_HYPHEN = "\u2011"  # that no line breaks at
_TERM = 26  # characters of an option's name and value beside which its text stands


class Option(click.Option):
    """An option of a section of help; "": one of the command's own."""

    section = ""


option = functools.partial(click.option, cls=Option)


def options_of(*several: Callable[..., Any], section: str = "") -> Callable[..., Any]:
    """Several options at once, in help in their order, below ``section`` where they are in none yet."""

    def add(function: Any) -> Any:
        before = len(getattr(function, "__click_params__", ()))
        made = functools.reduce(lambda made, option: option(made), reversed(several), function)
        for each in made.__click_params__[before:]:
            if isinstance(each, Option):
                each.section = each.section or section
        return made

    return add


class Formatter(click.HelpFormatter):
    """click's, which breaks no word at its hyphens."""

    def write(self, string: str) -> None:
        super().write(string.replace(_HYPHEN, "-"))

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Any, col_max: int = _TERM, col_spacing: int = 2) -> None:
        super().write_dl([(term, text.replace("-", _HYPHEN)) for term, text in rows], col_max, col_spacing)


class Context(click.Context):
    formatter_class = Formatter


class Command(click.Command):
    """A command whose help has sections."""

    context_class = Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises UsageError where what is read is named twice by an option of one value: click would take the last. Of
        an option that is missing it says what the option is, of a word too many which option it stands behind."""
        _, words, given = self.make_parser(ctx).parse_args(list(args))
        for each in given:
            single = isinstance(each, click.Option) and not each.multiple and READ & {*each.opts}
            if single and given.count(each) > 1 and not ctx.resilient_parsing:
                name = max(each.opts, key=len)
                raise click.UsageError(f"{name} takes one and is given {given.count(each)} times: leave one.", ctx)
        takes_words = any(isinstance(each, click.Argument) for each in self.get_params(ctx))
        if words and not takes_words and self.get_help_option(ctx) not in given:
            option = next((each for each in reversed(args[: args.index(words[0])]) if each.startswith("-")), None)
            flags = {name for each in given if isinstance(each, click.Option) and each.is_flag for name in each.opts}
            taken = f"{option} takes {'none' if option in flags else 'one'}"
            taken = taken if option else f"{ctx.info_name} takes options only"
            raise click.UsageError(f"{words[0]} belongs to no option: {taken}. A name with spaces needs quotes.", ctx)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            if not isinstance(error.param, click.Option):
                raise
            name = f"{max(error.param.opts, key=len)} {error.param.metavar}"
            raise click.UsageError(f"{name} is missing: {error.param.help}", ctx) from None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        if self._help_option is None:
            self._help_option = Option(
                [*self.get_help_option_names(ctx), "_help"], is_flag=False, flag_value="", metavar="[SECTION]",
                is_eager=True, expose_value=False, callback=self._show_help, help="This, or the options of a section.",
            )  # fmt: skip
            self._help_option.section = "output"
        return self._help_option

    def _show_help(self, ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is None or ctx.resilient_parsing:
            return
        if value and value not in (sections := self.sections(ctx)):
            named = ", ".join(name for name in sections if name)
            raise click.UsageError(f'--help {value}: no section is called "{value}". Sections: {named}.')
        click.echo(self.get_section(ctx, value) if value else ctx.get_help())
        ctx.exit()

    def sections(self, ctx: click.Context) -> dict[str, list[tuple[Option, tuple[str, str]]]]:
        """Name -> its options, each with what help says of it."""
        found: dict[str, list[tuple[Option, tuple[str, str]]]] = {"": []}
        for each in self.get_params(ctx):
            if isinstance(each, Option) and (record := each.get_help_record(ctx)):
                found.setdefault(each.section, []).append((each, record))
        if "output" in found:
            found["output"] = found.pop("output")  # last: every command has it
        return found

    def get_section(self, ctx: click.Context, name: str) -> str:
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        self._write_section(formatter, name, self.sections(ctx)[name])
        return formatter.getvalue().rstrip("\n")

    def get_help(self, ctx: click.Context) -> str:
        """As many sections whole as fit the screen: the last ones first to be named only, ``output`` before them."""
        names = [name for name in self.sections(ctx) if name]
        for whole in range(len(names), -1, -1):
            ctx.meta[SECTIONS] = ["", *names[:whole]]
            if (text := super().get_help(ctx)).count("\n") < SCREEN:
                break
        return text

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = self.sections(ctx)
        for name in ctx.meta[SECTIONS]:
            self._write_section(formatter, name, sections[name])
        if others := [name for name in sections if name not in ctx.meta[SECTIONS]]:
            with formatter.section(f"More, each with {ctx.command_path} --help SECTION"):
                formatter.write_dl(
                    [(name, " ".join(max(each.opts, key=len) for each, _ in sections[name])) for name in others]
                )

    @staticmethod
    def _write_section(
        formatter: click.HelpFormatter, name: str, options: list[tuple[Option, tuple[str, str]]]
    ) -> None:
        if options:
            with formatter.section(f"Options of {name}" if name else "Options"):
                formatter.write_dl([record for _, record in options])


SECTIONS = f"{__name__}.sections"  # in the context: those that are shown whole
