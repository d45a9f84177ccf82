"""Writes the source of a Typer app with bootcli's commands, options and markup mode that does nothing: the yardstick
for the start-up time of help."""

import inspect
import typing

import typer

HEAD = """\
import pathlib, typing
import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=EPILOG,
)
"""


def source(app: typer.Typer) -> str:
    """Python source; it imports only typer."""
    assert app.registered_callback is not None
    parts = [HEAD.replace("EPILOG", repr(app.info.epilog))]
    parts.append("@app.callback()\n" + _function(app.registered_callback.callback))
    for command in app.registered_commands:
        parts.append(f"@app.command(epilog={command.epilog!r})\n" + _function(command.callback))
    return "\n\n".join([*parts, "app()\n"])


def _function(function: object) -> str:
    assert callable(function)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if hints[name] is typer.Context:
            parameters.append(f"{name}: typer.Context")
        else:
            parameters.append(f"{name}: {_annotation(hints[name])} = {parameter.default!r}")
    return f"def {function.__name__}({', '.join(parameters)}):\n    {function.__doc__!r}"


def _annotation(hint: object) -> str:
    kind, info = typing.get_args(hint)
    maker = "Argument" if type(info).__name__ == "ArgumentInfo" else "Option"
    plain = vars(getattr(typer, maker)())
    given = {key: value for key, value in vars(info).items() if value != plain[key] and key != "callback"}
    names = [given.pop("default", None), *(given.pop("param_decls", None) or ())]  # in Annotated, the first is a name
    options = ", ".join([repr(name) for name in names if name] + [f"{key}={value!r}" for key, value in given.items()])
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else repr(kind)
    return f"typing.Annotated[{name}, typer.{maker}({options})]"
