"""A YAML file as plain values: safe (a file can name values, never code), and each key once.

Not here: what the keys mean (config.py).
"""

from pathlib import Path

import yaml


class OnceLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML takes the last one without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping; expected text", key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping at the top level. ValueError says what is wrong with the file."""
    try:
        raw = OnceLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}: " if mark else ""
        what = ", ".join(x for x in (error.context, error.problem) if x)
        raise ValueError(f"{where}cannot be read as YAML: {what}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        kind = "an empty file" if raw is None else type(raw).__name__
        raise ValueError(f"expected `key: value` lines at the top level, got {kind}")
    return raw
