"""The tree of the errors that a worker answers."""

import inspect
import re

from handlers.core import errors


def test_tree_in_the_docstring_matches_the_error_classes():
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"[ │├└─]*(?=\w+(  |$))", line):
            name = re.findall(r"\w+", line)[0]
            path = path[: (len(match[0]) - 4) // 4] + [name]
            drawn[name] = path[-2] if len(path) > 1 else "Exception"
    classes = dict(inspect.getmembers(errors, lambda member: inspect.isclass(member)))
    assert drawn == {name: cls.__base__.__name__ for name, cls in classes.items()}


def test_only_request_errors_and_overload_have_a_4xx_status():
    for error in (value for value in vars(errors).values() if inspect.isclass(value)):
        has_4xx = issubclass(error, errors.RequestError) or error is errors.Overloaded
        assert error.code // 100 == (4 if has_4xx else 5)
        assert error("why").body() == {"code": error.code, "type": error.__name__, "message": "why"}
