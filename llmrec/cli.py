"""The command line: finds the verb, runs its module, turns errors into messages and exit statuses.

A verb is a module of `llmrec.commands` with `add_arguments(parser)`, `run(args) -> int | None` and `EXAMPLE`, a
command line that runs. Only the chosen verb is imported. Each verb gets `--json` (`args.as_json`) and the words it
was called with (`args.argv`).

Exit status: 0 done; 1 a check failed; 2 wrong usage, configuration or input; 70 a fault of llmrec itself;
130 interrupted.

What a verb prints, tracebacks of libraries included, is freed of secrets (`llmrec.redaction`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType

from llmrec import __version__
from llmrec.errors import LlmrecError
from llmrec.redaction import redacted_output

VERBS: tuple[tuple[str, str], ...] = (
    ("quickstart", "a first run from data to report, in one command"),
    ("pull", "download a named model or data set into the cache"),
    ("prepare", "turn raw interactions into a data set: filter, map, order, split"),
    ("inspect", "count a data set and look for leaks"),
    ("instruct", "write a data set as prompts and answers"),
    ("tokenize", "give items codes, for models that generate them"),
    ("summarize", "write texts of items and of users' tastes"),
    ("check", "validate a recipe without loading weights"),
    ("train", "run the stages of a recipe"),
    ("evaluate", "measure a run on a split"),
    ("compare", "compare two runs with a paired test"),
    ("plan", "measure a data set and choose depth and width; run a sweep"),
    ("recommend", "rank items for a history or for a table of users"),
    ("export", "save a trained language model with its adapter merged"),
    ("report", "write runs as one HTML page"),
    ("push", "publish a run on the Hub, with a model card"),
    ("list", "list what recipes can name"),
    ("explain", "show options, paper and files of one name"),
)
_FAULT, _INTERRUPTED = 70, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Words after the program's name; those of the process when left out.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with redacted_output():
        return _answer(words)


def _answer(words: list[str]) -> int:
    # A default, so that a user's own choice stays: no library we start reports usage to anybody.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not words or words[0].startswith("-"):
        return _answer_without_verb(words)
    if words[0] not in dict(VERBS):
        near = difflib.get_close_matches(words[0], dict(VERBS), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"verbs: {', '.join(verb for verb, _ in VERBS)}"
        print(f"llmrec: error: there is no verb {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return _guarded(words)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `llmrec --help`; it imports no command."""
    width = max(len(verb) for verb, _ in VERBS)
    parser = argparse.ArgumentParser(
        prog="llmrec",
        usage="llmrec VERB ... [--json]",
        description="Recommendation systems with large language models.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS)
        + "\n\n`llmrec VERB --help` shows the flags of a verb and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmrec {__version__}")
    return parser


def build_verb_parser(verb: str, command: ModuleType) -> argparse.ArgumentParser:
    """The parser of one verb.

    Args:
        verb: Its name.
        command: Its module.
    """
    parser = argparse.ArgumentParser(
        prog=f"llmrec {verb}",
        description=(command.__doc__ or dict(VERBS).get(verb, "")).strip(),
        epilog=f"example:\n  {command.EXAMPLE.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `relaunch` removes --launcher by its full name
    )
    command.add_arguments(parser)
    about_json = "one JSON object on standard output, all else on standard error"
    parser.add_argument("--json", dest="as_json", action="store_true", help=about_json)
    return parser


def import_verb(verb: str) -> ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"llmrec.commands.{verb}")


def _answer_without_verb(words: list[str]) -> int:
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    _, unknown = parser.parse_known_args(words)
    parser.error(f"expected a verb before {unknown[0]!r}; `llmrec --help` lists them")


def _guarded(words: list[str]) -> int:
    """Run the verb; every way to end becomes an exit status."""
    try:
        return _run_verb(words)
    except LlmrecError as error:
        _explain_error(str(error), error)
        return error.exit_status
    except BrokenPipeError:
        # The reader of the output left (`| head`). Python would complain once more when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        _explain_error(str(error), error)
        return 2
    except KeyboardInterrupt:
        print("llmrec: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception:
        traceback.print_exc()
        print("llmrec: this is a fault of llmrec, not of your input; please report the lines above", file=sys.stderr)
        return _FAULT


def _run_verb(words: list[str]) -> int:
    from llmrec.commands.output import json_output

    command = import_verb(words[0])
    args = build_verb_parser(words[0], command).parse_args(words[1:])
    args.argv = words
    _log_to_stderr()
    with json_output() if args.as_json else nullcontext():
        status = command.run(args)
        sys.stdout.flush()
    return int(status or 0)


def _explain_error(message: str, error: Exception) -> None:
    if os.environ.get("LLMREC_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    else:
        message += "\n(LLMREC_DEBUG=1 shows where it happened)"
    print(f"llmrec: error: {message}", file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("llmrec")
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
